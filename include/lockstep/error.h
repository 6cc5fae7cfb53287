// What a file, a flag or a request can cause: lockstep::Error, and nothing else.
#pragma once

#include <stdexcept>
#include <string>

namespace lockstep {

/// What kind of thing went wrong; the message says the rest.
enum class ErrorCode {
  invalid_argument,  ///< a value that a caller passed is outside its documented range
  not_found,         ///< a file, model, tensor or name that does not exist
  io,                ///< the operating system refused a read, write or connection
  format,            ///< bytes that break the rules of their format
  unsupported,       ///< well-formed, but something that lockstep does not compute
  context_full,      ///< more tokens than the session's context holds
};

/// Thrown by every part of the library. The message reads
/// `[where] rule: expected ..., got ...`, with file name and byte offset when reading a file.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace lockstep

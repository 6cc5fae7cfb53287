// Owners for what the Rust library hands out, and its errors as lockstep::Error.
#pragma once

#include <lockstep_text.h>

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "tensor/fail.h"

namespace lockstep::text {

inline lst_text view(std::string_view text) { return {text.data(), text.size()}; }

/// Bytes that the library allocated.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { lst_buffer_free(&buffer_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  lst_buffer* out() { return &buffer_; }
  std::string str() const { return {buffer_.data, buffer_.size}; }

 private:
  lst_buffer buffer_{};
};

/// Calls entry(error buffer) and throws what it reports.
template <typename Entry>
void call(const Entry& entry) {
  Buffer error;
  const lst_status status = entry(error.out());
  if (status == LST_OK) return;
  const ErrorCode code = status == LST_INVALID_ARGUMENT ? ErrorCode::invalid_argument
                         : status == LST_UNSUPPORTED    ? ErrorCode::unsupported
                                                        : ErrorCode::format;
  throw Error(code, error.str());
}

template <auto kFree>
struct Free {
  template <typename T>
  void operator()(T* handle) const {
    kFree(handle);
  }
};
using TokenizerHandle = std::unique_ptr<lst_tokenizer, Free<lst_tokenizer_free>>;
using DetokenizerHandle = std::unique_ptr<lst_detokenizer, Free<lst_detokenizer_free>>;
using TemplateHandle = std::unique_ptr<lst_template, Free<lst_template_free>>;

}  // namespace lockstep::text

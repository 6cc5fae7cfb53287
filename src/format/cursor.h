// A bounded little-endian reader: every read is checked against the end, every error names the
// file and the byte offset.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "tensor/fail.h"

namespace lockstep {

static_assert(std::endian::native == std::endian::little, "files are read in place");

class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}

  size_t offset() const { return offset_; }
  size_t remaining() const { return bytes_.size() - offset_; }

  template <typename T>
  T read(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  /// The next `count` bytes, in place.
  std::span<const std::byte> take(uint64_t count, std::string_view what) {
    if (count > remaining()) {
      fail(ErrorCode::format, "[{}: byte {}] {}: expected {} bytes, got {} before the end of the file",
           where_, offset_, what, count, remaining());
    }
    const auto part = bytes_.subspan(offset_, count);
    offset_ += count;
    return part;
  }

  /// "file: byte N" for messages.
  std::string here() const { return where_ + ": byte " + std::to_string(offset_); }

 private:
  std::span<const std::byte> bytes_;
  std::string where_;
  size_t offset_ = 0;
};

}  // namespace lockstep

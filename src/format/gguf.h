// The GGUF container: typed metadata and tensor descriptions. Format: ggml's docs/gguf.md,
// versions 2 and 3, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lockstep/tensor.h"

namespace lockstep {

/// Arrays keep their elements; strings point into the file.
using GgufValue = std::variant<int64_t, uint64_t, double, bool, std::string_view, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string_view>>;

struct GgufTensor {
  std::string_view name;
  DType dtype = DType::f32;
  Shape shape;  ///< outermost first: ggml's extents reversed
  std::span<const std::byte> data;
  uint64_t offset = 0;  ///< of the data, from the start of the file
};

/// A parsed GGUF header. Holds views into the bytes it was given.
class Gguf {
 public:
  /// Parses and checks header, metadata and tensor table; tensor data must lie inside the file
  /// without overlap. Error `format` with the byte offset. `where` names the file.
  Gguf(std::span<const std::byte> bytes, const std::string& where);

  const std::map<std::string_view, GgufValue>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  bool has(std::string_view key) const { return metadata_.contains(key); }
  /// Error if the key is present with another type.
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string_view> text(std::string_view key) const;
  std::vector<int64_t> integers(std::string_view key) const;
  std::vector<double> numbers(std::string_view key) const;
  std::vector<std::string_view> texts(std::string_view key) const;

 private:
  std::string where_;
  std::map<std::string_view, GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace lockstep

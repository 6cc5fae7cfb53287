#include "format/safetensors.h"

#include <fmt/format.h>
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "format/cursor.h"
#include "format/json.h"
#include "format/write_file.h"
#include "lockstep/checkpoint.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

using nlohmann::json;

// The reference implementation's own limit.
constexpr uint64_t kMaxHeader = 100'000'000;

constexpr std::array<std::pair<std::string_view, DType>, 11> kNames = {{
    {"F64", DType::f64},
    {"F32", DType::f32},
    {"F16", DType::f16},
    {"BF16", DType::bf16},
    {"I64", DType::i64},
    {"I32", DType::i32},
    {"I16", DType::i16},
    {"I8", DType::i8},
    {"U8", DType::u8},
    {"U32", DType::u32},
    {"BOOL", DType::boolean},
}};

DType parse_dtype(const json& entry, const std::string& where, const std::string& name) {
  const std::string text = entry.at("dtype").get<std::string>();
  for (const auto& [known, dtype] : kNames) {
    if (text == known) return dtype;
  }
  fail(ErrorCode::unsupported,
       "[{}: {}] dtype: expected F64, F32, F16, BF16, an integer type or BOOL, got {}", where, name, text);
}

// The shape, checked so that its size in bytes cannot overflow.
Shape parse_shape(const json& entry, const std::string& where, const std::string& name) {
  constexpr int64_t kMost = int64_t{1} << 56;
  std::vector<int64_t> dims;
  int64_t elements = 1;
  for (const json& dim : entry.at("shape")) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > static_cast<uint64_t>(kMost)) {
      fail(ErrorCode::format, "[{}: {}] shape: expected extents of 0 to 2^56, got {}", where, name,
           dim.dump());
    }
    dims.push_back(dim.get<int64_t>());
    if (dims.back() > 0 && elements > kMost / dims.back()) {
      fail(ErrorCode::format, "[{}: {}] shape: expected at most 2^56 elements, got {}", where, name,
           entry.at("shape").dump());
    }
    elements *= dims.back();
  }
  if (dims.size() > Shape::kMaxRank) {
    fail(ErrorCode::format, "[{}: {}] shape: expected at most {} axes, got {}", where, name, Shape::kMaxRank,
         dims.size());
  }
  return Shape(dims);
}

SafeTensor parse_tensor(const std::string& name, const json& entry, std::span<const std::byte> data,
                        const std::string& where) {
  const bool complete = entry.is_object() && entry.contains("dtype") && entry["dtype"].is_string() &&
                        entry.contains("shape") && entry["shape"].is_array() &&
                        entry.contains("data_offsets");
  if (!complete) {
    fail(ErrorCode::format, "[{}: {}] header: expected dtype, shape and data_offsets, got {:.60}", where,
         name, entry.dump());
  }
  SafeTensor tensor{name, parse_dtype(entry, where, name), parse_shape(entry, where, name), {}};
  const json& offsets = entry.at("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    fail(ErrorCode::format, "[{}: {}] data_offsets: expected two numbers, got {}", where, name,
         offsets.dump());
  }
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  if (begin > end || end > data.size()) {
    fail(ErrorCode::format, "[{}: {}] data_offsets: expected a range within {} bytes, got {} to {}", where,
         name, data.size(), begin, end);
  }
  const auto needed = static_cast<uint64_t>(tensor.shape.size() * dtype_block_bytes(tensor.dtype));
  if (end - begin != needed) {
    fail(ErrorCode::format, "[{}: {}] data_offsets: expected {} bytes for shape {}, got {}", where, name,
         needed, tensor.shape.str(), end - begin);
  }
  tensor.data = data.subspan(begin, end - begin);
  return tensor;
}

// Side by side: an overlap or a gap is a sign of a damaged or a hostile file.
void check_cover(SafeTensors& file, std::span<const std::byte> data, const std::string& where) {
  std::ranges::stable_sort(file.tensors, {},
                           [](const SafeTensor& t) {  // one without data before its neighbour
                             return std::pair(t.data.data(), t.data.data() + t.data.size());
                           });
  const std::byte* at = data.data();
  for (const SafeTensor& tensor : file.tensors) {
    if (tensor.data.data() != at) {
      fail(ErrorCode::format,
           "[{}: {}] data_offsets: expected to begin at {}, where the tensor before ends, got {}", where,
           tensor.name, at - data.data(), tensor.data.data() - data.data());
    }
    at += tensor.data.size();
  }
  if (at != data.data() + data.size()) {
    fail(ErrorCode::format, "[{}] data: expected {} bytes, as the tensors say, got {}", where,
         at - data.data(), data.size());
  }
}

}  // namespace

SafeTensors read_safetensors(std::span<const std::byte> bytes, const std::string& where) {
  Cursor cursor(bytes, where);
  const auto length = cursor.read<uint64_t>("header length");
  if (length > kMaxHeader) {
    fail(ErrorCode::format, "[{}: byte 0] header length: expected at most {}, got {}", where, kMaxHeader,
         length);
  }
  const auto header = cursor.take(length, "header");
  const auto data = bytes.subspan(cursor.offset());
  SafeTensors file;
  try {
    const auto* text = reinterpret_cast<const char*>(header.data());
    const json table = parse_json({text, header.size()}, where + ": byte 8");
    if (!table.is_object()) fail(ErrorCode::format, "[{}: byte 8] header: expected a JSON object", where);
    for (const auto& [name, entry] : table.items()) {
      if (name == "__metadata__") {
        for (const auto& [key, value] : entry.items()) {
          if (value.is_string()) file.metadata[key] = value.get<std::string>();
        }
        continue;
      }
      file.tensors.push_back(parse_tensor(name, entry, data, where));
    }
  } catch (const json::exception& error) {
    fail(ErrorCode::format, "[{}: byte 8] header: {}", where, error.what());
  }
  check_cover(file, data, where);
  return file;
}

NamedTensor NamedTensor::of(std::string name, const Tensor& tensor) {
  return {std::move(name), DType::f32, tensor.shape(), std::as_bytes(tensor.values())};
}

void save_tensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                  const std::map<std::string, std::string>& metadata) {
  // By hand: there may be a million tensors, each with a short and known entry.
  std::string header = "{";
  size_t offset = 0;
  try {
    if (!metadata.empty()) header += "\"__metadata__\":" + nlohmann::json(metadata).dump();
    for (const NamedTensor& tensor : tensors) {
      const auto* known =
          std::ranges::find(kNames, tensor.dtype, &std::pair<std::string_view, DType>::second);
      header += fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                            header.size() > 1 ? "," : "", nlohmann::json(tensor.name).dump(), known->first,
                            fmt::join(tensor.shape.begin(), tensor.shape.end(), ","), offset,
                            offset + tensor.data.size());
      offset += tensor.data.size();
    }
  } catch (const nlohmann::json::type_error&) {
    fail(ErrorCode::invalid_argument, "[{}] header: expected names and metadata in UTF-8, got other bytes",
         path.string());
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  std::vector<std::span<const std::byte>> parts = {std::as_bytes(std::span(&length, 1)),
                                                   std::as_bytes(std::span(header))};
  for (const NamedTensor& tensor : tensors) parts.push_back(tensor.data);
  write_file(path, parts);
}

}  // namespace lockstep

#include "format/gguf.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "format/cursor.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

enum class ValueType : uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  string,
  array,
  u64,
  i64,
  f64,
};

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kMaxElements = std::numeric_limits<int64_t>::max() / 8;

std::string_view read_string(Cursor& cursor, std::string_view what) {
  const auto length = cursor.read<uint64_t>(what);
  const auto bytes = cursor.take(length, what);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

size_t scalar_bytes(ValueType type) {
  switch (type) {
    case ValueType::u8:
    case ValueType::i8:
    case ValueType::boolean: return 1;
    case ValueType::u16:
    case ValueType::i16: return 2;
    case ValueType::u32:
    case ValueType::i32:
    case ValueType::f32: return 4;
    case ValueType::u64:
    case ValueType::i64:
    case ValueType::f64: return 8;
    default: return 0;
  }
}

int64_t read_signed(Cursor& cursor, ValueType type) {
  switch (type) {
    case ValueType::u8: return cursor.read<uint8_t>("value");
    case ValueType::i8: return cursor.read<int8_t>("value");
    case ValueType::u16: return cursor.read<uint16_t>("value");
    case ValueType::i16: return cursor.read<int16_t>("value");
    case ValueType::u32: return cursor.read<uint32_t>("value");
    case ValueType::i32: return cursor.read<int32_t>("value");
    case ValueType::boolean: return cursor.read<uint8_t>("value") != 0;
    default: return cursor.read<int64_t>("value");
  }
}

double read_real(Cursor& cursor, ValueType type) {
  return type == ValueType::f32 ? cursor.read<float>("value") : cursor.read<double>("value");
}

GgufValue read_array(Cursor& cursor, std::string_view key) {
  const auto type = static_cast<ValueType>(cursor.read<uint32_t>("array type"));
  const auto count = cursor.read<uint64_t>("array length");
  // The least that `count` elements can occupy must be there before anything is allocated.
  const size_t least = type == ValueType::string ? sizeof(uint64_t) : scalar_bytes(type);
  if (least == 0) {
    fail(ErrorCode::format, "[{}] {}: expected an array of scalars or strings, got type {}", cursor.here(),
         key, static_cast<uint32_t>(type));
  }
  if (count > cursor.remaining() / least) {
    fail(ErrorCode::format, "[{}] {}: expected an array that fits in the file, got {} elements",
         cursor.here(), key, count);
  }
  if (type == ValueType::string) {
    std::vector<std::string_view> values(count);
    for (auto& value : values) value = read_string(cursor, key);
    return values;
  }
  if (type == ValueType::f32 || type == ValueType::f64) {
    std::vector<double> values(count);
    for (auto& value : values) value = read_real(cursor, type);
    return values;
  }
  std::vector<int64_t> values(count);
  for (auto& value : values) value = read_signed(cursor, type);
  return values;
}

GgufValue read_value(Cursor& cursor, std::string_view key) {
  const auto type = static_cast<ValueType>(cursor.read<uint32_t>("value type"));
  switch (type) {
    case ValueType::string: return read_string(cursor, key);
    case ValueType::array: return read_array(cursor, key);
    case ValueType::f32:
    case ValueType::f64: return read_real(cursor, type);
    case ValueType::boolean: return cursor.read<uint8_t>(key) != 0;
    case ValueType::u64: return cursor.read<uint64_t>(key);
    case ValueType::u8:
    case ValueType::i8:
    case ValueType::u16:
    case ValueType::i16:
    case ValueType::u32:
    case ValueType::i32:
    case ValueType::i64: return read_signed(cursor, type);
  }
  fail(ErrorCode::format, "[{}] {}: expected a value type of 0 to 12, got {}", cursor.here(), key,
       static_cast<uint32_t>(type));
}

// Names of ggml.h's enum ggml_type for what is not read here; empty: none that is in files.
std::string_view unread_type(uint32_t type) {
  switch (type) {
    case 9: return "Q8_1";
    case 10: return "Q2_K";
    case 11: return "Q3_K";
    case 15: return "Q8_K";
    case 16: return "IQ2_XXS";
    case 17: return "IQ2_XS";
    case 18: return "IQ3_XXS";
    case 19: return "IQ1_S";
    case 20: return "IQ4_NL";
    case 21: return "IQ3_S";
    case 22: return "IQ2_S";
    case 23: return "IQ4_XS";
    case 29: return "IQ1_M";
    case 34: return "TQ1_0";
    case 35: return "TQ2_0";
    case 39: return "MXFP4";
    default: return "";
  }
}

DType read_dtype(Cursor& cursor, std::string_view name) {
  const auto type = cursor.read<uint32_t>("tensor type");
  switch (type) {  // numbers of ggml.h's enum ggml_type
    case 0: return DType::f32;
    case 1: return DType::f16;
    case 2: return DType::q4_0;
    case 3: return DType::q4_1;
    case 6: return DType::q5_0;
    case 7: return DType::q5_1;
    case 8: return DType::q8_0;
    case 12: return DType::q4_k;
    case 13: return DType::q5_k;
    case 14: return DType::q6_k;
    case 24: return DType::i8;
    case 25: return DType::i16;
    case 26: return DType::i32;
    case 27: return DType::i64;
    case 28: return DType::f64;
    case 30: return DType::bf16;
    default:
      fail(ErrorCode::unsupported,
           "[{}] {}: expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K, got {}",
           cursor.here(), name,
           unread_type(type).empty() ? fmt::format("ggml type {}", type) : unread_type(type));
  }
}

// Reads one entry of the tensor table; `data` is filled in later, when its start is known.
GgufTensor read_tensor(Cursor& cursor) {
  GgufTensor tensor;
  tensor.name = read_string(cursor, "tensor name");
  const auto rank = cursor.read<uint32_t>("tensor rank");
  if (rank < 1 || rank > 4) {
    fail(ErrorCode::format, "[{}] {}: expected 1 to 4 dimensions, got {}", cursor.here(), tensor.name, rank);
  }
  int64_t dims[4];
  uint64_t elements = 1;
  for (uint32_t axis = rank; axis-- > 0;) {
    const auto extent = cursor.read<uint64_t>("tensor extent");
    if (extent == 0 || extent > kMaxElements / elements) {
      fail(ErrorCode::format, "[{}] {}: expected extents of at least 1 whose product fits in 60 bits, got {}",
           cursor.here(), tensor.name, extent);
    }
    elements *= extent;
    dims[axis] = static_cast<int64_t>(extent);
  }
  tensor.shape = Shape(std::span<const int64_t>(dims, rank));
  tensor.dtype = read_dtype(cursor, tensor.name);
  if (tensor.shape[-1] % dtype_block(tensor.dtype) != 0) {
    fail(ErrorCode::format, "[{}] {}: expected rows in whole blocks of {} ({}), got {} elements",
         cursor.here(), tensor.name, dtype_block(tensor.dtype), dtype_name(tensor.dtype), tensor.shape[-1]);
  }
  tensor.offset = cursor.read<uint64_t>("tensor offset");
  return tensor;
}

void check_overlap(const std::vector<GgufTensor>& tensors, const std::string& where) {
  std::vector<const GgufTensor*> order;
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const GgufTensor& before = *order[i - 1];
    if (before.offset + before.data.size() > order[i]->offset) {
      fail(ErrorCode::format, "[{}: byte {}] {}: expected data after that of {}, got an overlap", where,
           order[i]->offset, order[i]->name, before.name);
    }
  }
}

template <typename T>
[[noreturn]] void wrong_type(const std::string& where, std::string_view key, T expected) {
  fail(ErrorCode::format, "[{}] {}: expected {}, got another type", where, key, expected);
}

}  // namespace

Gguf::Gguf(std::span<const std::byte> bytes, const std::string& where) : where_(where) {
  Cursor cursor(bytes, where);
  const auto magic = cursor.read<uint32_t>("magic");
  if (magic != kMagic) {
    fail(ErrorCode::format,
         "[{}: byte 0] magic: expected \"GGUF\", got 0x{:08x}; a model is a .gguf file or a directory "
         "with a config.json",
         where, magic);
  }
  const auto version = cursor.read<uint32_t>("version");
  if (version != 2 && version != 3) {
    fail(ErrorCode::unsupported,
         "[{}: byte 4] version: expected GGUF version 2 or 3 in little-endian order, got {}", where, version);
  }
  const auto tensor_count = cursor.read<uint64_t>("tensor count");
  const auto value_count = cursor.read<uint64_t>("metadata count");
  for (uint64_t i = 0; i < value_count; ++i) {
    const auto key = read_string(cursor, "metadata key");
    if (!metadata_.emplace(key, read_value(cursor, key)).second) {
      fail(ErrorCode::format, "[{}] metadata: expected each key once, got {} again", cursor.here(), key);
    }
  }
  // A table entry takes at least 32 bytes.
  if (tensor_count > cursor.remaining() / 32) {
    fail(ErrorCode::format,
         "[{}] tensor count: expected a table that fits in the file, got {} (is the file cut short?)",
         cursor.here(), tensor_count);
  }
  std::set<std::string_view> names;
  for (uint64_t i = 0; i < tensor_count; ++i) {
    tensors_.push_back(read_tensor(cursor));
    if (!names.insert(tensors_.back().name).second) {
      fail(ErrorCode::format, "[{}] tensor table: expected each name once, got {} again", cursor.here(),
           tensors_.back().name);
    }
  }

  const int64_t alignment = integer("general.alignment").value_or(32);
  if (alignment < 1 || alignment > (1 << 30)) {
    fail(ErrorCode::format, "[{}] general.alignment: expected 1 to 2^30, got {}", where, alignment);
  }
  const auto align = static_cast<uint64_t>(alignment);
  const uint64_t start = (cursor.offset() + align - 1) / align * align;
  for (auto& tensor : tensors_) {
    const uint64_t size = static_cast<uint64_t>(tensor.shape.size() / dtype_block(tensor.dtype) *
                                                dtype_block_bytes(tensor.dtype));
    const uint64_t room = bytes.size() > start ? bytes.size() - start : 0;
    if (tensor.offset > room || size > room - tensor.offset) {
      fail(ErrorCode::format,
           "[{}] {}: expected {} bytes of data at offset {}, got the end of the file at byte {} "
           "(is the file cut short?)",
           where, tensor.name, size, start + tensor.offset, bytes.size());
    }
    tensor.offset += start;
    tensor.data = bytes.subspan(tensor.offset, size);
  }
  check_overlap(tensors_, where);
}

std::optional<int64_t> Gguf::integer(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<int64_t>(&it->second)) return *value;
  if (const auto* value = std::get_if<uint64_t>(&it->second)) {
    if (*value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return static_cast<int64_t>(*value);
    }
  }
  wrong_type(where_, key, "an integer");
}

std::optional<double> Gguf::number(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<double>(&it->second)) return *value;
  return static_cast<double>(*integer(key));
}

std::optional<bool> Gguf::boolean(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<bool>(&it->second)) return *value;
  wrong_type(where_, key, "true or false");
}

std::optional<std::string_view> Gguf::text(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<std::string_view>(&it->second)) return *value;
  wrong_type(where_, key, "a string");
}

std::vector<int64_t> Gguf::integers(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<std::vector<int64_t>>(&it->second)) return *value;
  wrong_type(where_, key, "an array of integers");
}

std::vector<double> Gguf::numbers(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<std::vector<double>>(&it->second)) return *value;
  if (const auto* value = std::get_if<std::vector<int64_t>>(&it->second)) {
    return {value->begin(), value->end()};
  }
  wrong_type(where_, key, "an array of numbers");
}

std::vector<std::string_view> Gguf::texts(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return {};
  if (const auto* value = std::get_if<std::vector<std::string_view>>(&it->second)) return *value;
  wrong_type(where_, key, "an array of strings");
}

}  // namespace lockstep

#include "quant/blocks.h"

#include <cstring>
#include <vector>

#include "quant/half.h"
#include "tensor/fail.h"

namespace lockstep::quant {
namespace {

uint16_t read_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}
float read_f16(const uint8_t* p) { return f16_value(read_u16(p)); }

float read_plain(DType dtype, const uint8_t* p) {
  if (dtype == DType::f16) return read_f16(p);
  if (dtype == DType::bf16) return bf16_value(read_u16(p));
  float value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// 16 bytes, low nibbles first: columns 0..15, then 16..31.
void split_nibbles(const uint8_t* p, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = p[i] & 0x0F;
    codes[i + 16] = p[i] >> 4;
  }
}

void add_fifth_bits(const uint8_t* p, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  for (int i = 0; i < 32; ++i) codes[i] |= (bits >> i & 1U) << 4;
}

// Four runs of 64 columns; the low nibbles of 32 bytes come before the high ones.
void split_super_nibbles(const uint8_t* p, uint8_t* codes) {
  for (int run = 0; run < 4; ++run, p += 32, codes += 64) {
    for (int i = 0; i < 32; ++i) {
      codes[i] = p[i] & 0x0F;
      codes[i + 32] = p[i] >> 4;
    }
  }
}

void read_q6k(const uint8_t* low, const uint8_t* high, uint8_t* codes) {
  for (int half = 0; half < 2; ++half, low += 64, high += 32, codes += 128) {
    for (int i = 0; i < 32; ++i) {
      codes[i] = (low[i] & 0x0F) | (high[i] & 3) << 4;
      codes[i + 32] = (low[i + 32] & 0x0F) | (high[i] >> 2 & 3) << 4;
      codes[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
      codes[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
    }
  }
}

void read_block(DType dtype, const uint8_t* block, uint8_t* codes) {
  switch (dtype) {
    case DType::q4_0: return split_nibbles(block + 2, codes);
    case DType::q4_1: return split_nibbles(block + 4, codes);
    case DType::q5_0: split_nibbles(block + 6, codes); return add_fifth_bits(block + 2, codes);
    case DType::q5_1: split_nibbles(block + 8, codes); return add_fifth_bits(block + 4, codes);
    case DType::q8_0:
      for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(block[2 + i] + 128);
      return;
    case DType::q4_k: return split_super_nibbles(block + 16, codes);
    case DType::q5_k:
      split_super_nibbles(block + 48, codes);
      for (int i = 0; i < 256; ++i) codes[i] |= (block[16 + i % 32] >> (i / 32) & 1) << 4;
      return;
    case DType::q6_k: return read_q6k(block, block + 128, codes);
    case DType::mlx_q4:
      for (int i = 0; i < 4; ++i) {
        codes[2 * i] = block[i] & 0x0F;
        codes[2 * i + 1] = block[i] >> 4;
      }
      return;
    default: std::memcpy(codes, block, 4);  // mlx_q8
  }
}

// Scale and bias for each run of `scale_columns` (or an MLX group), in the order of columns.
struct ScaleBias {
  float scale;
  float bias;
};
ScaleBias block_scale(DType dtype, const uint8_t* block, int64_t part) {
  switch (dtype) {
    case DType::q4_1:
    case DType::q5_1: return {read_f16(block), read_f16(block + 2)};
    case DType::q4_k:
    case DType::q5_k: {
      const ScaleMins packed = scale_mins(block + 4);
      return {read_f16(block) * packed.scale[part], -(read_f16(block + 2) * packed.min[part])};
    }
    case DType::q6_k: return {read_f16(block + 208) * static_cast<int8_t>(block[192 + part]), 0};
    default: return {read_f16(block), 0};
  }
}

const uint8_t* stored_bytes_of(const StoredTensor& tensor, int64_t row) {
  return reinterpret_cast<const uint8_t*>(tensor.data.data()) + row * tensor.row_bytes();
}

void dequantise_mlx(const StoredTensor& tensor, int64_t row, const uint8_t* codes, float* out) {
  const int64_t groups = tensor.columns() / tensor.group_size;
  const int64_t width = dtype_block_bytes(tensor.scale_dtype);
  const auto* scales = reinterpret_cast<const uint8_t*>(tensor.scales.data()) + row * groups * width;
  const auto* biases = reinterpret_cast<const uint8_t*>(tensor.biases.data()) + row * groups * width;
  for (int64_t k = 0; k < tensor.columns(); ++k) {
    const int64_t at = k / tensor.group_size * width;
    const float product = read_plain(tensor.scale_dtype, scales + at) * static_cast<float>(codes[k]);
    out[k] = product + read_plain(tensor.scale_dtype, biases + at);
  }
}

}  // namespace

CodeFormat code_format(DType dtype) {
  switch (dtype) {
    case DType::q4_0: return {4, 8, false, 32};
    case DType::q4_1: return {4, 0, true, 32};
    case DType::q5_0: return {5, 16, false, 32};
    case DType::q5_1: return {5, 0, true, 32};
    case DType::q8_0: return {8, 128, false, 32};
    case DType::q4_k: return {4, 0, true, 32};
    case DType::q5_k: return {5, 0, true, 32};
    case DType::q6_k: return {6, 32, false, 16};
    case DType::mlx_q4: return {4, 0, true, 32};
    case DType::mlx_q8: return {8, 0, true, 32};
    default: return {};
  }
}

ScaleMins scale_mins(const uint8_t* packed) {
  uint32_t scale, min, rest;  // a byte a sub-block: of the first four; of the last four, low and high nibbles
  std::memcpy(&scale, packed, 4);
  std::memcpy(&min, packed + 4, 4);
  std::memcpy(&rest, packed + 8, 4);
  // The two high bits of the last four are those of the first four's bytes.
  constexpr uint32_t kSix = 0x3F3F3F3F, kTwo = 0x03030303, kNibble = 0x0F0F0F0F;
  const uint32_t scales[2] = {scale & kSix, (rest & kNibble) | (scale >> 6 & kTwo) << 4};
  const uint32_t mins[2] = {min & kSix, (rest >> 4 & kNibble) | (min >> 6 & kTwo) << 4};
  ScaleMins out;
  std::memcpy(out.scale, scales, sizeof(scales));
  std::memcpy(out.min, mins, sizeof(mins));
  return out;
}

void read_codes(DType dtype, const uint8_t* stored, int64_t columns, uint8_t* codes) {
  const int64_t step = dtype_block(dtype);
  const int64_t bytes = dtype_block_bytes(dtype);
  for (int64_t k = 0; k < columns; k += step, stored += bytes) read_block(dtype, stored, codes + k);
}

void dequantise_row(const StoredTensor& tensor, int64_t row, float* out) {
  const uint8_t* p = stored_bytes_of(tensor, row);
  const CodeFormat format = code_format(tensor.dtype);
  const int64_t columns = tensor.columns();
  if (format.bits == 0) {
    if (tensor.dtype != DType::f32 && tensor.dtype != DType::f16 && tensor.dtype != DType::bf16) {
      fail(ErrorCode::unsupported, "[{}] element type: expected one of weights, got {}", tensor.source,
           dtype_name(tensor.dtype));
    }
    const int64_t width = dtype_block_bytes(tensor.dtype);
    for (int64_t k = 0; k < columns; ++k) out[k] = read_plain(tensor.dtype, p + k * width);
    return;
  }
  std::vector<uint8_t> codes(static_cast<size_t>(columns));
  read_codes(tensor.dtype, p, columns, codes.data());
  if (tensor.group_size > 0) return dequantise_mlx(tensor, row, codes.data(), out);
  const int64_t step = dtype_block(tensor.dtype);
  for (int64_t k = 0; k < columns; k += format.scale_columns) {
    const uint8_t* block = p + k / step * dtype_block_bytes(tensor.dtype);
    const auto [scale, bias] = block_scale(tensor.dtype, block, k % step / format.scale_columns);
    for (int64_t i = k; i < k + format.scale_columns; ++i) {
      const float product = scale * static_cast<float>(codes[i] - format.zero);
      out[i] = format.has_bias ? product + bias : product;
    }
  }
}

}  // namespace lockstep::quant

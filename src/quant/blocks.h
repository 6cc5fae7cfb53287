// The block formats of files, one row at a time: codes, scales and biases out of stored bytes.
// GGUF layouts: ggml's block structures (ggml-common.h); MLX: mlx.core.quantize, mode "affine".
#pragma once

#include <cstddef>
#include <cstdint>

#include "lockstep/checkpoint.h"

namespace lockstep::quant {

/// Bits of a code, its zero point, and whether there is a bias: weight = scale * (code - zero) + bias.
struct CodeFormat {
  int bits = 0;  // 0: not a block format
  int zero = 0;
  bool has_bias = false;
  int scale_columns = 32;  // columns that share a scale, at most one block
};
CodeFormat code_format(DType dtype);

/// Codes of `columns` columns, whole blocks, one byte each (zero point not subtracted). `stored`: the blocks.
void read_codes(DType dtype, const uint8_t* stored, int64_t columns, uint8_t* codes);

/// Stored row `row` as f32, computed as the reference dequantises: one rounding an operation.
/// out: [columns]. Plain types are converted.
void dequantise_row(const StoredTensor& tensor, int64_t row, float* out);

/// The 6-bit scales and minima of the 8 sub-blocks of a q4_k or q5_k block.
struct ScaleMins {
  uint8_t scale[8];
  uint8_t min[8];
};
/// packed: 12 bytes.
ScaleMins scale_mins(const uint8_t* packed);

}  // namespace lockstep::quant

// Weights packed for the kernels. A panel holds 16 rows of a matrix, interleaved so that a vector
// lane is a row: a product then needs no sum across lanes, and each output has one accumulator.
//
// Plain formats: for each column (f32, f16), the 16 rows' elements side by side; bf16: for each pair of
// columns the 16 rows' pairs, the last one filled up with zeros.
//
// Block formats keep the file's codes and scales, regrouped by unit (one block of the file for each
// of the 16 rows), at the file's size (K-quants: their 6-bit scales are widened to bytes):
//   q4_0       d f16[16], codes                        (32 columns)
//   q4_1       d f16[16], m f16[16], codes             (32)
//   q5_0       d f16[16], codes, bit 4                 (32)
//   q5_1       d f16[16], m f16[16], codes, bit 4      (32)
//   q8_0       d f16[16], codes + 128                  (32)
//   q4_k       d f16[16], dmin f16[16], scale u8[8][16], min u8[8][16], 8 x codes         (256)
//   q5_k       d f16[16], dmin f16[16], scale u8[8][16], min u8[8][16], 8 x codes + bit 4 (256)
//   q6_k       d f16[16], scale i8[16][16], 8 x codes                                     (256)
//   mlx_q4, 8  scale[16], bias[16] in the file's type, group / 32 x codes                 (group)
//
// Codes of 32 columns come as 8 quads; quad j holds columns 4j..4j+3 of every row, 64 bytes:
// byte 4r + i is column 4j + i of row r.
//   4 bits: 256 bytes; byte b of vector v has quad v in its low nibble and quad v + 4 in its high.
//   bit 4: 64 bytes; bit j of a byte belongs to quad j.
//   6 bits: 384 bytes; vectors 3h..3h+2 have quads 4h..4h+2 in their low six bits and quad 4h + 3 in
//   their top two, its bits 4-5, 2-3, 0-1.  8 bits: 512 bytes, quad after quad.
//
// Long rows are cut into strips of columns, each packed like a matrix of its own, one strip after the other:
// the activations of a strip's columns then stay in the nearest cache while its panels pass through it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lockstep/tensor.h"

namespace lockstep {
struct StoredTensor;
}

namespace lockstep::quant {

inline constexpr int64_t kPanelRows = 16;
/// Columns whose activations share a scale, and whose codes are summed as integers.
inline constexpr int64_t kBlock = 32;

/// What a panel of this element type looks like.
struct PanelLayout {
  int64_t unit_columns = 1;  // columns in a unit
  int64_t unit_bytes = 0;    // bytes of a unit, all 16 rows
};
PanelLayout panel_layout(DType dtype, DType scale_dtype, int64_t group_size);

/// Columns of a strip: as many as leave room in the nearest cache, in about equal strips; 0, all, where one
/// does and for plain formats, whose activations take little beside the weights.
int64_t strip_columns(int64_t columns, DType dtype, const PanelLayout& layout);

/// A packed matrix [rows, columns]. Immutable.
struct PanelMatrix {
  DType dtype = DType::f32;
  DType scale_dtype = DType::f16;    // of MLX formats
  int64_t group_size = 0;            // of MLX formats
  int64_t rows = 0;                  // N
  int64_t columns = 0;               // K
  int64_t strip_columns = 0;         // of a strip, the last may have fewer; 0: all, in one
  int64_t panel_bytes = 0;           // of all strips together
  int64_t panels = 0;                // ceil(rows / 16)
  const std::byte* bytes = nullptr;  // [strips, panels, panel_bytes of the strip]

  int64_t strips() const { return strip_columns == 0 ? 1 : (columns + strip_columns - 1) / strip_columns; }
  /// A strip as a matrix of its own, of one strip.
  PanelMatrix strip(int64_t index) const;
  /// Of a matrix of one strip.
  const std::byte* panel(int64_t index) const { return bytes + index * panel_bytes; }
};

/// The stored bytes of the rows of one panel, by panel row.
struct PanelRows {
  const uint8_t* data[kPanelRows];
  const uint8_t* scales[kPanelRows];  // of MLX formats
  const uint8_t* biases[kPanelRows];
};
/// Writes the panel of columns [first, first + columns) of 16 stored rows; data of a row that the matrix does
/// not have is zeros. first: a multiple of a unit's columns. panel: [panel_bytes of those columns].
void write_panel(const StoredTensor& tensor, const PanelRows& rows, int64_t first, int64_t columns,
                 uint8_t* panel);

/// Row `row` of a packed matrix as f32, dequantised exactly as the reference does. out: [columns].
void unpack_row(const PanelMatrix& matrix, int64_t row, float* out);

}  // namespace lockstep::quant

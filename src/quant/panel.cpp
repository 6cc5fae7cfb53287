#include "quant/panel.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "lockstep/checkpoint.h"
#include "quant/blocks.h"
#include "quant/half.h"

namespace lockstep::quant {
namespace {

constexpr int64_t code_bytes(int bits) { return 64 * bits; }

uint32_t load_quad(const uint8_t* p) {
  uint32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return quad;
}
void store_quad(uint8_t* p, uint32_t quad) { std::memcpy(p, &quad, sizeof(quad)); }

// Four dwords; where a panel wants those of 16 rows side by side, they are transposed four rows at a time.
using Quads = uint32_t __attribute__((vector_size(16)));

Quads load_quads(const uint8_t* p) {
  Quads quads;
  std::memcpy(&quads, p, sizeof(quads));
  return quads;
}
void store_quads(uint8_t* p, Quads quads) { std::memcpy(p, &quads, sizeof(quads)); }

// Dword v of four rows side by side, v by v. rows: 16 bytes of each.
std::array<Quads, 4> transposed(const Quads (&rows)[4]) {
  const Quads ab_low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Quads ab_high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Quads cd_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Quads cd_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  return {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
          __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
          __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
          __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
}

// Writes dword v of four rows at out + 64 * v, side by side.
void transpose(const Quads (&rows)[4], uint8_t* out) {
  const std::array<Quads, 4> dwords = transposed(rows);
  for (int v = 0; v < 4; ++v) store_quads(out + 64 * v, dwords[v]);
}

// Writes dword v of every row at out + 64 * v, rows side by side, for 4 * `vectors` dwords. `row(r)` points
// at those of row r.
template <typename Row>
void interleave(int64_t vectors, const Row& row, uint8_t* out) {
  for (int r = 0; r < kPanelRows; r += 4) {
    const uint8_t* from[4] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
    for (int64_t v = 0; v < vectors; ++v) {
      transpose({load_quads(from[0] + 16 * v), load_quads(from[1] + 16 * v), load_quads(from[2] + 16 * v),
                 load_quads(from[3] + 16 * v)},
                out + 256 * v + 4 * r);
    }
  }
}

// Writes 32 codes of 4 or 5 bits of every row of a panel; `row(r)` points at those of row r, a byte each.
template <typename Row>
void write_codes(int bits, const Row& row, uint8_t* panel) {
  uint8_t nibbles[kPanelRows][16];
  for (int r = 0; r < kPanelRows; ++r) {
    const uint8_t* codes = row(r);
    for (int i = 0; i < 16; ++i) nibbles[r][i] = (codes[i] & 0x0F) | (codes[i + 16] & 0x0F) << 4;
  }
  interleave(1, [&](int r) { return nibbles[r]; }, panel);
  if (bits == 4) return;
  for (int r = 0; r < kPanelRows; ++r) {
    const uint8_t* codes = row(r);
    uint8_t* at = panel + 256 + 4 * r;
    uint32_t fifth = 0;
    for (int j = 0; j < 8; ++j) fifth |= (load_quad(codes + 4 * j) >> 4 & 0x01010101U) << j;
    store_quad(at, fifth);
  }
}

// Bytes 4 r + i to 16 i + r: what `interleave` put side by side as dwords, by byte.
void split_bytes(const uint8_t* dwords, uint8_t* out) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  Bytes v[4];
  std::memcpy(v, dwords, sizeof(v));
  // Bytes of even and of odd index, twice.
  for (int round = 0; round < 2; ++round) {
    const auto even = [](Bytes a, Bytes b) {
      return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    };
    const auto odd = [](Bytes a, Bytes b) {
      return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    };
    const Bytes next[4] = {even(v[0], v[1]), even(v[2], v[3]), odd(v[0], v[1]), odd(v[2], v[3])};
    std::memcpy(v, next, sizeof(v));
  }
  std::memcpy(out, v, sizeof(v));
}

// 32 bytes whose low nibbles are 32 columns and whose high ones the next 32. low, high: [16], paired.
void pair_nibbles(const uint8_t* bytes, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < 16; ++i) {
    low[i] = (bytes[i] & 0x0F) | bytes[i + 16] << 4;
    high[i] = bytes[i] >> 4 | (bytes[i + 16] & 0xF0);
  }
}

void write_q4_k(const uint8_t* const (&rows)[kPanelRows], int64_t at, uint8_t* panel) {
  uint8_t nibbles[kPanelRows][8][16];  // of 32 columns: byte i holds columns i and i + 16
  for (int r = 0; r < kPanelRows; ++r) {
    for (int run = 0; run < 4; ++run)
      pair_nibbles(rows[r] + at + 16 + 32 * run, nibbles[r][2 * run], nibbles[r][2 * run + 1]);
  }
  for (int s = 0; s < 8; ++s) interleave(1, [&](int r) { return nibbles[r][s]; }, panel + s * code_bytes(4));
}

// The 256 codes of a row of q6_k, a byte each: quads of columns 32 s + 16 half + {0, 4, 8, 12}.
void read_q6_k(const uint8_t* block, Quads (&codes)[8][2]) {
  constexpr uint32_t kLow = 0x0F0F0F0F, kTop = 0x30303030;
  for (int i = 0; i < 4; ++i) {  // from column 128 (i / 2) on, and of each 32 there from 16 (i % 2) on
    const uint8_t* at = block + 64 * (i / 2) + 16 * (i % 2);
    const Quads even = load_quads(at), odd = load_quads(at + 32);
    const Quads top = load_quads(block + 128 + 16 * i);
    Quads(*blocks)[2] = codes + 4 * (i / 2);
    blocks[0][i % 2] = (even & kLow) | (top << 4 & kTop);
    blocks[1][i % 2] = (odd & kLow) | (top << 2 & kTop);
    blocks[2][i % 2] = (even >> 4 & kLow) | (top & kTop);
    blocks[3][i % 2] = (odd >> 4 & kLow) | (top >> 2 & kTop);
  }
}

void write_q6_k(const uint8_t* const (&rows)[kPanelRows], int64_t at, uint8_t* panel) {
  constexpr uint32_t kTop = 0xC0C0C0C0;
  Quads codes[4][8][2];
  for (int r = 0; r < kPanelRows; r += 4) {
    for (int i = 0; i < 4; ++i) read_q6_k(rows[r + i] + at, codes[i]);
    for (int s = 0; s < 8; ++s) {
      for (int half = 0; half < 2; ++half) {
        const std::array<Quads, 4> quads =
            transposed({codes[0][s][half], codes[1][s][half], codes[2][s][half], codes[3][s][half]});
        uint8_t* out = panel + s * code_bytes(6) + 192 * half + 4 * r;
        for (int v = 0; v < 3; ++v) store_quads(out + 64 * v, quads[v] | (quads[3] << (2 * v + 2) & kTop));
      }
    }
  }
}

uint8_t read_code(int bits, const uint8_t* panel, int64_t r, int64_t column) {
  const int64_t j = column / 4;
  const int64_t at = 4 * r + column % 4;
  if (bits == 8) return panel[64 * j + at];
  if (bits == 6) {
    const uint8_t* three = panel + 192 * (j / 4) + at;
    if (j % 4 < 3) return three[64 * (j % 4)] & 0x3F;
    return static_cast<uint8_t>((three[0] >> 6) << 4 | (three[64] >> 6) << 2 | three[128] >> 6);
  }
  uint8_t code = panel[64 * (j % 4) + at] >> (j / 4 * 4) & 0x0F;
  if (bits == 5) code |= (panel[256 + at] >> j & 1) << 4;
  return code;
}

// Copies kBytes at `at` of every row, side by side.
template <int kBytes>
void gather(const uint8_t* const (&rows)[kPanelRows], int64_t at, uint8_t* out) {
  for (int r = 0; r < kPanelRows; ++r) std::memcpy(out + r * kBytes, rows[r] + at, kBytes);
}

// Scales and biases of the unit whose blocks are at byte `at` of every row: the file's own bits.
void write_block_scales(DType dtype, const PanelRows& rows, int64_t at, uint8_t* unit) {
  uint8_t side_by_side[kPanelRows][16];  // scales and minima, by row
  uint8_t dwords[4 * 64];                // by four scales, then row
  switch (dtype) {
    case DType::q5_1: gather<2>(rows.data, at, unit); return gather<2>(rows.data, at + 2, unit + 32);
    case DType::q4_k:
    case DType::q5_k:
      gather<2>(rows.data, at, unit);
      gather<2>(rows.data, at + 2, unit + 32);
      for (int r = 0; r < kPanelRows; ++r) {
        const ScaleMins packed = scale_mins(rows.data[r] + at + 4);
        std::memcpy(side_by_side[r], &packed, sizeof(packed));
      }
      interleave(1, [&](int r) { return side_by_side[r]; }, dwords);
      for (int v = 0; v < 4; ++v) split_bytes(dwords + 64 * v, unit + 64 + 64 * v);
      return;
    case DType::q6_k:
      gather<2>(rows.data, at + 208, unit);
      interleave(1, [&](int r) { return rows.data[r] + at + 192; }, dwords);
      for (int v = 0; v < 4; ++v) split_bytes(dwords + 64 * v, unit + 32 + 64 * v);
      return;
    default: gather<2>(rows.data, at, unit);
  }
}

void write_group_scales(DType scale_dtype, const PanelRows& rows, int64_t group, uint8_t* unit) {
  if (scale_dtype == DType::f32) {
    gather<4>(rows.scales, 4 * group, unit);
    return gather<4>(rows.biases, 4 * group, unit + 64);
  }
  gather<2>(rows.scales, 2 * group, unit);
  gather<2>(rows.biases, 2 * group, unit + 32);
}

// Bytes of a unit before its codes.
int64_t unit_header(DType dtype, DType scale_dtype) {
  switch (dtype) {
    case DType::q4_1:
    case DType::q5_1: return 64;
    case DType::q4_k:
    case DType::q5_k: return 320;
    case DType::q6_k: return 288;
    case DType::mlx_q4:
    case DType::mlx_q8: return 2 * 16 * dtype_block_bytes(scale_dtype);
    default: return 32;
  }
}

// Index of an element in a panel of a plain format.
int64_t plain_element(DType dtype, int64_t column, int64_t r) {
  if (dtype != DType::bf16) return column * kPanelRows + r;
  return column / 2 * 2 * kPanelRows + 2 * r + column % 2;
}

void pack_plain_panel(const StoredTensor& tensor, const PanelRows& rows, int64_t columns, uint8_t* panel) {
  const int64_t width = dtype_block_bytes(tensor.dtype);
  int64_t k = 0;
  if (tensor.dtype != DType::f16) {
    const int64_t vectors = columns * width / 16;
    interleave(vectors, [&](int r) { return rows.data[r]; }, panel);
    k = vectors * 16 / width;
  }
  for (; k < columns; ++k) {
    for (int r = 0; r < kPanelRows; ++r) {
      std::memcpy(panel + plain_element(tensor.dtype, k, r) * width, rows.data[r] + k * width,
                  static_cast<size_t>(width));
    }
  }
  // The second half of the last pair.
  if (tensor.dtype == DType::bf16 && columns % 2 != 0) {
    for (int r = 0; r < kPanelRows; ++r)
      std::memset(panel + plain_element(tensor.dtype, columns, r) * width, 0, static_cast<size_t>(width));
  }
}

// Writes the codes of a unit, whose blocks are at byte `at` of every row.
void write_unit_codes(DType dtype, const uint8_t* const (&rows)[kPanelRows], int64_t at, int64_t columns,
                      uint8_t* out) {
  switch (dtype) {
    case DType::q4_k: return write_q4_k(rows, at, out);
    case DType::q6_k: return write_q6_k(rows, at, out);
    case DType::mlx_q8:
      for (int64_t k = 0; k < columns; k += kBlock)
        interleave(2, [&](int r) { return rows[r] + at + k; }, out + k / kBlock * code_bytes(8));
      return;
    default: break;
  }
  const int bits = code_format(dtype).bits;
  uint8_t codes[kPanelRows][256];
  for (int r = 0; r < kPanelRows; ++r) read_codes(dtype, rows[r] + at, columns, codes[r]);
  for (int64_t s = 0; s < columns / kBlock; ++s)
    write_codes(bits, [&](int r) { return codes[r] + s * kBlock; }, out + s * code_bytes(bits));
}

// Units whose blocks are `kScales` f16 and then codes in the order of panels (which pair nibbles as these
// do), 16 * kVectors bytes of them, each to be changed by `kFlip`. A few are written at a time, which do not
// leave the nearest cache.
template <int kScales, int kVectors, uint8_t kFlip = 0>
void pack_simple_units(const PanelRows& rows, int64_t units, uint8_t* unit) {
  constexpr int64_t kBlockBytes = 2 * kScales + 16 * kVectors, kUnitBytes = 16 * kBlockBytes;
  constexpr int64_t kTogether = 16;
  constexpr uint32_t kFlips = 0x01010101U * kFlip;
  for (int64_t first = 0; first < units; first += kTogether) {
    for (int r = 0; r < kPanelRows; r += 4) {
      const uint8_t* from[4];
      for (int i = 0; i < 4; ++i) from[i] = rows.data[r + i] + first * kBlockBytes;
      uint8_t* to = unit + first * kUnitBytes;
      for (int64_t u = first; u < std::min(units, first + kTogether); ++u, to += kUnitBytes) {
        for (int s = 0; s < kScales; ++s) {
          for (int i = 0; i < 4; ++i) std::memcpy(to + 32 * s + 2 * (r + i), from[i] + 2 * s, 2);
        }
        for (int v = 0; v < kVectors; ++v) {
          Quads codes[4];
          for (int i = 0; i < 4; ++i) codes[i] = load_quads(from[i] + 2 * kScales + 16 * v) ^ kFlips;
          transpose(codes, to + 32 * kScales + 256 * v + 4 * r);
        }
        for (const uint8_t*& at : from) at += kBlockBytes;
      }
    }
  }
}

void pack_block_panel(const StoredTensor& tensor, const PanelRows& rows, int64_t columns, uint8_t* panel) {
  const PanelLayout layout = panel_layout(tensor.dtype, tensor.scale_dtype, tensor.group_size);
  const int64_t header = unit_header(tensor.dtype, tensor.scale_dtype);
  const int64_t units = columns / layout.unit_columns;
  const int64_t block_bytes = dtype_block_bytes(tensor.dtype);
  const int64_t step = layout.unit_columns / dtype_block(tensor.dtype) * block_bytes;  // of a stored row
  switch (tensor.dtype) {
    case DType::q4_0: return pack_simple_units<1, 1>(rows, units, panel);
    case DType::q4_1: return pack_simple_units<2, 1>(rows, units, panel);
    case DType::q8_0: return pack_simple_units<1, 2, 0x80>(rows, units, panel);  // plus 128
    default: break;
  }
  for (int64_t u = 0; u < units; ++u) {
    uint8_t* unit = panel + u * layout.unit_bytes;
    if (tensor.group_size > 0) {
      write_group_scales(tensor.scale_dtype, rows, u, unit);
    } else {
      write_block_scales(tensor.dtype, rows, u * step, unit);
    }
    write_unit_codes(tensor.dtype, rows.data, u * step, layout.unit_columns, unit + header);
  }
}

float read_scale(DType dtype, const uint8_t* p) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return dtype == DType::bf16 ? bf16_value(bits) : f16_value(bits);
}

// Scale and bias of row `r` for the part of a unit that starts at `column`.
std::array<float, 2> unit_scale(const PanelMatrix& w, const uint8_t* unit, int64_t r, int64_t column) {
  const auto f16_at = [&](int64_t offset) { return read_scale(DType::f16, unit + offset + 2 * r); };
  switch (w.dtype) {
    case DType::q4_1:
    case DType::q5_1: return {f16_at(0), f16_at(32)};
    case DType::q4_k:
    case DType::q5_k: {
      const int64_t s = column / 32;
      return {f16_at(0) * unit[64 + 16 * s + r], -(f16_at(32) * unit[192 + 16 * s + r])};
    }
    case DType::q6_k: return {f16_at(0) * static_cast<int8_t>(unit[32 + 16 * (column / 16) + r]), 0};
    case DType::mlx_q4:
    case DType::mlx_q8: {
      const int64_t width = dtype_block_bytes(w.scale_dtype);
      return {read_scale(w.scale_dtype, unit + r * width),
              read_scale(w.scale_dtype, unit + (kPanelRows + r) * width)};
    }
    default: return {f16_at(0), 0};
  }
}

}  // namespace

PanelLayout panel_layout(DType dtype, DType scale_dtype, int64_t group_size) {
  const int bits = code_format(dtype).bits;
  if (bits == 0) {
    const int64_t columns = dtype == DType::bf16 ? 2 : 1;
    return {columns, columns * kPanelRows * dtype_block_bytes(dtype)};
  }
  const int64_t columns = group_size > 0 ? group_size : dtype_block(dtype);
  return {columns, unit_header(dtype, scale_dtype) + columns / kBlock * code_bytes(bits)};
}

int64_t strip_columns(int64_t columns, DType dtype, const PanelLayout& layout) {
  if (code_format(dtype).bits == 0) return 0;
  // Of 32 KB, with the activations beside it (84 bytes for 32 columns) and some room.
  constexpr int64_t kPanelBytes = 20480;
  constexpr int64_t kStep = 256;  // a multiple of every unit
  const int64_t most = kPanelBytes / layout.unit_bytes * layout.unit_columns / kStep * kStep;
  const int64_t strips = (columns + most - 1) / most;
  return strips <= 1 ? 0 : ((columns + strips - 1) / strips + kStep - 1) / kStep * kStep;
}

PanelMatrix PanelMatrix::strip(int64_t index) const {
  PanelMatrix part = *this;
  if (strip_columns == 0) return part;
  const PanelLayout layout = panel_layout(dtype, scale_dtype, group_size);
  part.strip_columns = 0;
  part.columns = std::min(strip_columns, columns - index * strip_columns);
  part.panel_bytes = part.columns / layout.unit_columns * layout.unit_bytes;
  part.bytes = bytes + index * panels * (strip_columns / layout.unit_columns * layout.unit_bytes);
  return part;
}

void write_panel(const StoredTensor& tensor, const PanelRows& rows, int64_t first, int64_t columns,
                 uint8_t* panel) {
  PanelRows part = rows;
  for (int r = 0; r < kPanelRows; ++r) {
    part.data[r] += first / dtype_block(tensor.dtype) * dtype_block_bytes(tensor.dtype);
    if (tensor.group_size == 0) continue;
    const int64_t scales = first / tensor.group_size * dtype_block_bytes(tensor.scale_dtype);
    part.scales[r] += scales;
    part.biases[r] += scales;
  }
  code_format(tensor.dtype).bits == 0 ? pack_plain_panel(tensor, part, columns, panel)
                                      : pack_block_panel(tensor, part, columns, panel);
}

namespace {

// Of a matrix of one strip.
void unpack_strip_row(const PanelMatrix& matrix, int64_t row, float* out) {
  const auto* panel = reinterpret_cast<const uint8_t*>(matrix.panel(row / kPanelRows));
  const int64_t r = row % kPanelRows;
  const CodeFormat format = code_format(matrix.dtype);
  if (format.bits == 0) {
    const int64_t width = dtype_block_bytes(matrix.dtype);
    for (int64_t k = 0; k < matrix.columns; ++k) {
      out[k] = read_scale(matrix.dtype, panel + plain_element(matrix.dtype, k, r) * width);
    }
    return;
  }
  const PanelLayout layout = panel_layout(matrix.dtype, matrix.scale_dtype, matrix.group_size);
  const int64_t header = unit_header(matrix.dtype, matrix.scale_dtype);
  for (int64_t k = 0; k < matrix.columns; ++k) {
    const uint8_t* unit = panel + k / layout.unit_columns * layout.unit_bytes;
    const int64_t column = k % layout.unit_columns;
    const auto [scale, bias] = unit_scale(matrix, unit, r, column);
    const uint8_t* codes = unit + header + column / kBlock * code_bytes(format.bits);
    const float product =
        scale * static_cast<float>(read_code(format.bits, codes, r, column % kBlock) - format.zero);
    out[k] = format.has_bias ? product + bias : product;
  }
}

}  // namespace

void unpack_row(const PanelMatrix& matrix, int64_t row, float* out) {
  for (int64_t s = 0; s < matrix.strips(); ++s)
    unpack_strip_row(matrix.strip(s), row, out + s * matrix.strip_columns);
}

}  // namespace lockstep::quant

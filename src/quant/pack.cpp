#include "quant/pack.h"

#include <sys/mman.h>

#include <array>
#include <cstring>
#include <new>

#include "quant/blocks.h"
#include "quant/half.h"
#include "tensor/fail.h"

namespace lockstep::quant {
namespace {

constexpr int64_t code_bytes(int bits) { return 64 * bits; }

uint32_t load_quad(const uint8_t* p) {
  uint32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return quad;
}
void store_quad(uint8_t* p, uint32_t quad) { std::memcpy(p, &quad, sizeof(quad)); }

// Writes 32 codes of panel row `r`, four of a quad at a time.
void write_codes(int bits, const uint8_t* codes, int64_t r, uint8_t* panel) {
  uint8_t* at = panel + 4 * r;
  if (bits == 8) {
    for (int j = 0; j < 8; ++j) store_quad(at + 64 * j, load_quad(codes + 4 * j));
    return;
  }
  constexpr uint32_t kLow = 0x0F0F0F0F;
  for (int v = 0; v < 4; ++v) {
    const uint32_t low = load_quad(codes + 4 * v) & kLow, high = load_quad(codes + 4 * v + 16) & kLow;
    store_quad(at + 64 * v, low | high << 4);
  }
  if (bits == 5) {
    uint32_t fifth = 0;
    for (int j = 0; j < 8; ++j) fifth |= (load_quad(codes + 4 * j) >> 4 & 0x01010101U) << j;
    store_quad(at + 256, fifth);
  }
  if (bits == 6) {
    for (int half = 0; half < 2; ++half) {
      uint32_t top = 0;
      for (int j = 0; j < 4; ++j) top |= (load_quad(codes + 16 * half + 4 * j) >> 4 & 0x03030303U) << (2 * j);
      store_quad(at + 256 + 64 * half, top);
    }
  }
}

uint8_t read_code(int bits, const uint8_t* panel, int64_t r, int64_t column) {
  const int64_t j = column / 4;
  const int64_t at = 4 * r + column % 4;
  if (bits == 8) return panel[64 * j + at];
  uint8_t code = panel[64 * (j % 4) + at] >> (j / 4 * 4) & 0x0F;
  if (bits == 5) code |= (panel[256 + at] >> j & 1) << 4;
  if (bits == 6) code |= (panel[256 + 64 * (j / 4) + at] >> (2 * (j % 4)) & 3) << 4;
  return code;
}

void copy_scale(const uint8_t* from, int64_t bytes, int64_t r, uint8_t* scales) {
  std::memcpy(scales + r * bytes, from, static_cast<size_t>(bytes));
}

// Scales and biases of one unit of row `r`: the file's own bits.
void write_unit_scales(DType dtype, const uint8_t* block, int64_t r, uint8_t* unit) {
  switch (dtype) {
    case DType::q4_1:
    case DType::q5_1: copy_scale(block, 2, r, unit); return copy_scale(block + 2, 2, r, unit + 32);
    case DType::q4_k:
    case DType::q5_k:
      copy_scale(block, 2, r, unit);
      copy_scale(block + 2, 2, r, unit + 32);
      for (int s = 0; s < 8; ++s) {
        const ScaleMin packed = scale_min(block + 4, s);
        unit[64 + 16 * s + r] = packed.scale;
        unit[192 + 16 * s + r] = packed.min;
      }
      return;
    case DType::q6_k:
      copy_scale(block + 208, 2, r, unit);
      for (int s = 0; s < 16; ++s) unit[32 + 16 * s + r] = block[192 + s];
      return;
    default: copy_scale(block, 2, r, unit);
  }
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

void pack_plain_row(const StoredTensor& tensor, int64_t stored, int64_t r, uint8_t* panel) {
  const int64_t width = dtype_block_bytes(tensor.dtype);
  const auto* row = reinterpret_cast<const uint8_t*>(tensor.data.data()) + stored * tensor.row_bytes();
  int64_t k = 0;
  if (tensor.dtype == DType::bf16) {
    for (; k + 2 <= tensor.columns(); k += 2)
      store_quad(panel + plain_element(tensor.dtype, k, r) * width, load_quad(row + k * width));
  }
  for (; k < tensor.columns(); ++k)
    std::memcpy(panel + plain_element(tensor.dtype, k, r) * width, row + k * width,
                static_cast<size_t>(width));
}

void pack_block_row(const StoredTensor& tensor, int64_t stored, int64_t r, uint8_t* panel,
                    std::vector<uint8_t>& codes) {
  const PanelLayout layout = panel_layout(tensor.dtype, tensor.scale_dtype, tensor.group_size);
  const int bits = code_format(tensor.dtype).bits;
  const int64_t header = unit_header(tensor.dtype, tensor.scale_dtype);
  const int64_t units = tensor.columns() / layout.unit_columns;
  const auto* row = reinterpret_cast<const uint8_t*>(tensor.data.data()) + stored * tensor.row_bytes();
  // Four-bit blocks of 32 pair the columns of nibbles as panels do.
  const bool as_stored = tensor.dtype == DType::q4_0 || tensor.dtype == DType::q4_1;
  if (!as_stored) {
    codes.resize(static_cast<size_t>(tensor.columns()));
    read_codes(tensor, stored, codes.data());
  }
  for (int64_t u = 0; u < units; ++u) {
    uint8_t* unit = panel + u * layout.unit_bytes;
    if (tensor.group_size > 0) {
      const int64_t width = dtype_block_bytes(tensor.scale_dtype);
      const int64_t at = (stored * units + u) * width;
      copy_scale(reinterpret_cast<const uint8_t*>(tensor.scales.data()) + at, width, r, unit);
      copy_scale(reinterpret_cast<const uint8_t*>(tensor.biases.data()) + at, width, r,
                 unit + kPanelRows * width);
    } else {
      write_unit_scales(tensor.dtype, row + u * dtype_block_bytes(tensor.dtype), r, unit);
    }
    if (as_stored) {
      const uint8_t* nibbles = row + (u + 1) * dtype_block_bytes(tensor.dtype) - kBlock / 2;
      for (int v = 0; v < 4; ++v) store_quad(unit + header + 64 * v + 4 * r, load_quad(nibbles + 4 * v));
      continue;
    }
    for (int64_t s = 0; s < layout.unit_columns / kBlock; ++s) {
      write_codes(bits, codes.data() + u * layout.unit_columns + s * kBlock, r,
                  unit + header + s * code_bytes(bits));
    }
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

void PackedWeight::Unmap::operator()(std::byte* data) const { ::munmap(data, bytes); }

PackedWeight::PackedWeight(std::span<const StoredTensor> experts, Pool& pool) {
  experts_ = static_cast<int64_t>(experts.size());
  for (const StoredTensor& tensor : experts) {
    const bool plain =
        tensor.dtype == DType::f32 || tensor.dtype == DType::f16 || tensor.dtype == DType::bf16;
    if (!plain && code_format(tensor.dtype).bits == 0) {
      fail(ErrorCode::unsupported, "[{}] element type: expected one of weights, got {}", tensor.source,
           dtype_name(tensor.dtype));
    }
    const PanelLayout layout = panel_layout(tensor.dtype, tensor.scale_dtype, tensor.group_size);
    PanelMatrix matrix;
    matrix.dtype = tensor.dtype;
    matrix.scale_dtype = tensor.scale_dtype;
    matrix.group_size = tensor.group_size;
    matrix.rows = tensor.rows();
    matrix.columns = tensor.columns();
    matrix.panels = (matrix.rows + kPanelRows - 1) / kPanelRows;
    matrix.panel_bytes = (matrix.columns + layout.unit_columns - 1) / layout.unit_columns * layout.unit_bytes;
    bytes_ += matrix.panels * matrix.panel_bytes;
    stored_bytes_ += tensor.stored_bytes();
    matrices_.push_back(matrix);
  }
  // Anonymous pages start as zeros, which the padding rows keep.
  const auto size = static_cast<size_t>(bytes_);
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  ::madvise(data, size, MADV_HUGEPAGE);
  data_ = {static_cast<std::byte*>(data), Unmap{size}};

  struct Job {
    const StoredTensor* tensor;
    int64_t panel;
    std::byte* out;
  };
  std::vector<Job> jobs;
  std::byte* next = data_.get();
  for (size_t e = 0; e < experts.size(); ++e) {
    matrices_[e].bytes = next;
    for (int64_t p = 0; p < matrices_[e].panels; ++p, next += matrices_[e].panel_bytes) {
      jobs.push_back({&experts[e], p, next});
    }
  }
  pool.run(static_cast<int64_t>(jobs.size()), [&](int64_t index) {
    const Job& job = jobs[index];
    const int64_t first = job.panel * kPanelRows;
    std::vector<uint8_t> codes;
    for (int64_t r = 0; r < kPanelRows && first + r < job.tensor->rows(); ++r) {
      const int64_t stored = job.tensor->stored_row(first + r);
      auto* panel = reinterpret_cast<uint8_t*>(job.out);
      if (code_format(job.tensor->dtype).bits == 0) {
        pack_plain_row(*job.tensor, stored, r, panel);
      } else {
        pack_block_row(*job.tensor, stored, r, panel, codes);
      }
    }
  });
}

void unpack_row(const PanelMatrix& matrix, int64_t row, float* out) {
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

}  // namespace lockstep::quant

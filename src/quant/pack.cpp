#include "quant/pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

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

// Four dwords; where a panel wants those of 16 rows side by side, they are transposed four rows at a time.
using Quads = uint32_t __attribute__((vector_size(16)));

Quads load_quads(const uint8_t* p) {
  Quads quads;
  std::memcpy(&quads, p, sizeof(quads));
  return quads;
}
void store_quads(uint8_t* p, Quads quads) { std::memcpy(p, &quads, sizeof(quads)); }

// Writes dword v of every row at out + 64 * v, rows side by side, for 4 * `vectors` dwords. `row(r)` points
// at those of row r.
template <typename Row>
void interleave(int64_t vectors, const Row& row, uint8_t* out) {
  for (int r = 0; r < kPanelRows; r += 4) {
    const uint8_t* from[4] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
    for (int64_t v = 0; v < vectors; ++v) {
      const Quads a = load_quads(from[0] + 16 * v), b = load_quads(from[1] + 16 * v);
      const Quads c = load_quads(from[2] + 16 * v), d = load_quads(from[3] + 16 * v);
      const Quads ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Quads ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quads cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quads cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      uint8_t* at = out + 256 * v + 4 * r;
      store_quads(at, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
      store_quads(at + 64, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
      store_quads(at + 128, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      store_quads(at + 192, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
}

// Writes 32 codes of every row of a panel; `row(r)` points at those of row r, a byte each.
template <typename Row>
void write_codes(int bits, const Row& row, uint8_t* panel) {
  if (bits == 8) return interleave(2, row, panel);
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
    if (bits == 5) {
      uint32_t fifth = 0;
      for (int j = 0; j < 8; ++j) fifth |= (load_quad(codes + 4 * j) >> 4 & 0x01010101U) << j;
      store_quad(at, fifth);
    } else {
      for (int half = 0; half < 2; ++half) {
        uint32_t top = 0;
        for (int j = 0; j < 4; ++j)
          top |= (load_quad(codes + 16 * half + 4 * j) >> 4 & 0x03030303U) << (2 * j);
        store_quad(at + 64 * half, top);
      }
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

// The stored bytes of the rows of one panel, by panel row.
struct PanelRows {
  const uint8_t* data[kPanelRows];
  const uint8_t* scales[kPanelRows];  // of MLX formats
  const uint8_t* biases[kPanelRows];
};

// Copies kBytes at `at` of every row, side by side.
template <int kBytes>
void gather(const uint8_t* const (&rows)[kPanelRows], int64_t at, uint8_t* out) {
  for (int r = 0; r < kPanelRows; ++r) std::memcpy(out + r * kBytes, rows[r] + at, kBytes);
}

// Scales and biases of the unit whose blocks are at byte `at` of every row: the file's own bits.
void write_block_scales(DType dtype, const PanelRows& rows, int64_t at, uint8_t* unit) {
  switch (dtype) {
    case DType::q4_1:
    case DType::q5_1: gather<2>(rows.data, at, unit); return gather<2>(rows.data, at + 2, unit + 32);
    case DType::q4_k:
    case DType::q5_k:
      gather<2>(rows.data, at, unit);
      gather<2>(rows.data, at + 2, unit + 32);
      for (int r = 0; r < kPanelRows; ++r) {
        for (int s = 0; s < 8; ++s) {
          const ScaleMin packed = scale_min(rows.data[r] + at + 4, s);
          unit[64 + 16 * s + r] = packed.scale;
          unit[192 + 16 * s + r] = packed.min;
        }
      }
      return;
    case DType::q6_k:
      gather<2>(rows.data, at + 208, unit);
      for (int s = 0; s < 16; ++s) gather<1>(rows.data, at + 192 + s, unit + 32 + 16 * s);
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

void pack_plain_panel(const StoredTensor& tensor, const PanelRows& rows, uint8_t* panel) {
  const int64_t width = dtype_block_bytes(tensor.dtype);
  int64_t k = 0;
  if (tensor.dtype != DType::f16) {
    const int64_t vectors = tensor.columns() * width / 16;
    interleave(vectors, [&](int r) { return rows.data[r]; }, panel);
    k = vectors * 16 / width;
  }
  for (; k < tensor.columns(); ++k) {
    for (int r = 0; r < kPanelRows; ++r) {
      std::memcpy(panel + plain_element(tensor.dtype, k, r) * width, rows.data[r] + k * width,
                  static_cast<size_t>(width));
    }
  }
}

void pack_block_panel(const StoredTensor& tensor, const PanelRows& rows, uint8_t* panel) {
  const PanelLayout layout = panel_layout(tensor.dtype, tensor.scale_dtype, tensor.group_size);
  const int bits = code_format(tensor.dtype).bits;
  const int64_t header = unit_header(tensor.dtype, tensor.scale_dtype);
  const int64_t units = tensor.columns() / layout.unit_columns;
  const int64_t block_bytes = dtype_block_bytes(tensor.dtype);
  const int64_t step = layout.unit_columns / dtype_block(tensor.dtype) * block_bytes;  // of a stored row
  // Four-bit blocks of 32 pair the columns of nibbles as panels do.
  const bool as_stored = tensor.dtype == DType::q4_0 || tensor.dtype == DType::q4_1;
  uint8_t codes[kPanelRows][256];  // of a unit
  for (int64_t u = 0; u < units; ++u) {
    uint8_t* unit = panel + u * layout.unit_bytes;
    if (tensor.group_size > 0) {
      write_group_scales(tensor.scale_dtype, rows, u, unit);
    } else {
      write_block_scales(tensor.dtype, rows, u * step, unit);
    }
    if (as_stored) {
      const int64_t nibbles = (u + 1) * step - kBlock / 2;
      interleave(1, [&](int r) { return rows.data[r] + nibbles; }, unit + header);
      continue;
    }
    for (int r = 0; r < kPanelRows; ++r)
      read_codes(tensor.dtype, rows.data[r] + u * step, layout.unit_columns, codes[r]);
    for (int64_t s = 0; s < layout.unit_columns / kBlock; ++s)
      write_codes(bits, [&](int r) { return codes[r] + s * kBlock; }, unit + header + s * code_bytes(bits));
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

std::shared_ptr<std::byte> PanelMemory::take(size_t bytes) {
  constexpr size_t kLine = 64;
  bytes = (bytes + kLine - 1) / kLine * kLine;
  if (bytes > size_ - used_) {
    size_ = std::max(region_bytes_, bytes);
    used_ = 0;
    void* data =
        ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    ::madvise(data, size_, MADV_HUGEPAGE);
    region_ = {static_cast<std::byte*>(data), [size = size_](std::byte* region) { ::munmap(region, size); }};
  }
  std::byte* part = region_.get() + used_;
  used_ += bytes;
  return {region_, part};
}

PackedWeight::PackedWeight(std::span<const StoredTensor> experts, PanelMemory& memory) {
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
  data_ = memory.take(static_cast<size_t>(bytes_));
  const std::byte* next = data_.get();
  for (PanelMatrix& matrix : matrices_) {
    matrix.bytes = next;
    next += matrix.panels * matrix.panel_bytes;
  }
}

namespace {
// Of tensors that lie in memory.
void copy_bytes(std::span<const std::byte> part, std::byte* out) {
  std::memcpy(out, part.data(), part.size());
}
}  // namespace

PackedWeight::PackedWeight(std::span<const StoredTensor> experts, Pool& pool) {
  PanelMemory memory(0);
  *this = PackedWeight(experts, memory);
  Packer packer(copy_bytes);
  packer.add(*this, experts);
  packer.run(pool);
}

void Packer::add(const PackedWeight& weight, std::span<const StoredTensor> experts) {
  // As much as a huge page holds: two threads that meet in one would both have to fill it with zeros.
  constexpr int64_t kJobBytes = int64_t{2} << 20;
  std::byte* out = weight.data_.get();
  for (size_t e = 0; e < experts.size(); ++e) {
    const PanelMatrix& matrix = weight.matrix(static_cast<int64_t>(e));
    const int64_t step = 1 + kJobBytes / (matrix.panel_bytes + 1);
    for (int64_t first = 0; first < matrix.panels; first += step) {
      const int64_t last = std::min(matrix.panels, first + step);
      jobs_.push_back({experts[e], first, last, matrix.panel_bytes, out});
      out += (last - first) * matrix.panel_bytes;
    }
  }
}

void Packer::pack(const Job& job) const {
  constexpr int64_t kReadBytes = int64_t{128} << 10;  // at a time: they stay in the cache
  const StoredTensor& tensor = job.tensor;
  const int64_t all_rows = tensor.rows();
  const int64_t groups = tensor.group_size > 0 ? tensor.columns() / tensor.group_size : 0;
  const int64_t row_bytes = tensor.row_bytes(), scale_bytes = groups * dtype_block_bytes(tensor.scale_dtype);
  std::vector<std::byte> data, scales, biases;
  const std::vector<uint8_t> nothing(static_cast<size_t>(row_bytes));  // a row that the matrix does not have
  const auto bytes_of = [](const std::vector<std::byte>& read) {
    return reinterpret_cast<const uint8_t*>(read.data());
  };
  // Copies rows [begin, end) of a tensor's part, `bytes` each.
  const auto read = [&](std::span<const std::byte> part, int64_t bytes, int64_t begin, int64_t end,
                        std::vector<std::byte>& into) {
    const auto size = static_cast<size_t>((end - begin) * bytes);
    into.resize(size);
    if (size > 0) read_(part.subspan(static_cast<size_t>(begin * bytes), size), into.data());
  };
  const int64_t together = 1 + kReadBytes / (kPanelRows * row_bytes + 1);
  std::byte* out = job.out;
  for (int64_t first = job.first; first < job.last; first += together) {
    const int64_t last = std::min(job.last, first + together);
    // Rows of interleaved heads are somewhere between the first and the last of them.
    int64_t begin = all_rows, end = 0;
    for (int64_t row = first * kPanelRows; row < std::min(all_rows, last * kPanelRows); ++row) {
      begin = std::min(begin, tensor.stored_row(row));
      end = std::max(end, tensor.stored_row(row) + 1);
    }
    read(tensor.data, row_bytes, begin, end, data);
    read(tensor.scales, scale_bytes, begin, end, scales);
    read(tensor.biases, scale_bytes, begin, end, biases);
    for (int64_t panel = first; panel < last; ++panel, out += job.panel_bytes) {
      PanelRows rows;
      for (int r = 0; r < kPanelRows; ++r) {
        const int64_t row = panel * kPanelRows + r;
        const int64_t at = tensor.stored_row(std::min(row, all_rows - 1)) - begin;
        const bool there = row < all_rows;
        rows.data[r] = there ? bytes_of(data) + at * row_bytes : nothing.data();
        rows.scales[r] = there ? bytes_of(scales) + at * scale_bytes : nothing.data();
        rows.biases[r] = there ? bytes_of(biases) + at * scale_bytes : nothing.data();
      }
      auto* to = reinterpret_cast<uint8_t*>(out);
      code_format(tensor.dtype).bits == 0 ? pack_plain_panel(tensor, rows, to)
                                          : pack_block_panel(tensor, rows, to);
    }
  }
}

void Packer::run(Pool& pool, const std::function<void()>& beside,
                 const std::function<void(double)>& progress) {
  const std::thread::id here = std::this_thread::get_id();
  const auto count = static_cast<int64_t>(jobs_.size());
  std::atomic<int64_t> done{0};
  pool.run(count + 1, [&](int64_t index) {
    if (index == 0) return beside ? beside() : void();
    pack(jobs_[static_cast<size_t>(index - 1)]);
    const int64_t packed = done.fetch_add(1) + 1;
    if (progress && std::this_thread::get_id() == here)
      progress(static_cast<double>(packed) / static_cast<double>(count));
  });
  jobs_.clear();
  if (progress) progress(1);
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

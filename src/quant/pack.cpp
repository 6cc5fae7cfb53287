#include "quant/pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "quant/blocks.h"
#include "tensor/arena.h"
#include "tensor/fail.h"

namespace lockstep::quant {

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

PackedWeight::PackedWeight(std::span<const StoredTensor> experts, PanelMemory& memory, Source source)
    : stored_(experts.begin(), experts.end()), source_(std::move(source)) {
  experts_ = static_cast<int64_t>(experts.size());
  int64_t bytes = 0;
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
    matrix.strip_columns = strip_columns(matrix.columns, matrix.dtype, layout);
    matrix.panel_bytes = (matrix.columns + layout.unit_columns - 1) / layout.unit_columns * layout.unit_bytes;
    bytes += matrix.panels * matrix.panel_bytes;
    stored_bytes_ += tensor.stored_bytes();
    matrices_.push_back(matrix);
  }
  data_ = memory.take(static_cast<size_t>(bytes));
  const std::byte* next = data_.get();
  for (PanelMatrix& matrix : matrices_) {
    matrix.bytes = next;
    next += matrix.panels * matrix.panel_bytes;
  }
}

namespace {

// The stored rows among which those of panels [first, last) are.
std::pair<int64_t, int64_t> stored_rows(const StoredTensor& tensor, int64_t first, int64_t last) {
  const int64_t all = tensor.rows();
  int64_t begin = all, end = 0;  // rows of interleaved heads are somewhere between the first and the last
  for (int64_t row = first * kPanelRows; row < std::min(all, last * kPanelRows); ++row) {
    begin = std::min(begin, tensor.stored_row(row));
    end = std::max(end, tensor.stored_row(row) + 1);
  }
  return {begin, end};
}

// Calls `run` with the parts of a tensor's bytes that hold panels [first, last).
template <typename Run>
void each_part(const StoredTensor& tensor, int64_t first, int64_t last, const Run& run) {
  const auto [begin, end] = stored_rows(tensor, first, last);
  for (const std::span<const std::byte> part : {tensor.data, tensor.scales, tensor.biases}) {
    const size_t row_bytes = part.size() / static_cast<size_t>(tensor.rows());
    if (!part.empty())
      run(part.subspan(static_cast<size_t>(begin) * row_bytes, static_cast<size_t>(end - begin) * row_bytes));
  }
}

// Panels [first, last) of a tensor, which become those of `matrix` from `to` on. out: the bytes of `matrix`.
void pack_panels(const StoredTensor& tensor, const Source& source, int64_t first, int64_t last,
                 const PanelMatrix& matrix, int64_t to, std::byte* out) {
  constexpr int64_t kFetchBytes = int64_t{128} << 10;  // at a time: they stay in the cache
  const int64_t all_rows = tensor.rows();
  const int64_t groups = tensor.group_size > 0 ? tensor.columns() / tensor.group_size : 0;
  const int64_t row_bytes = tensor.row_bytes(), scale_bytes = groups * dtype_block_bytes(tensor.scale_dtype);
  const std::vector<uint8_t> nothing(static_cast<size_t>(row_bytes));  // a row that the matrix does not have
  std::vector<PanelMatrix> strips;
  for (int64_t s = 0; s < matrix.strips(); ++s) strips.push_back(matrix.strip(s));
  const int64_t together = 1 + kFetchBytes / (kPanelRows * row_bytes + 1);
  for (; first < last; first += together) {
    const int64_t end = std::min(last, first + together);
    each_part(tensor, first, end, source.fetch);
    for (int64_t panel = first; panel < end; ++panel, ++to) {
      PanelRows rows;
      for (int r = 0; r < kPanelRows; ++r) {
        const int64_t row = panel * kPanelRows + r;
        const int64_t stored = row < all_rows ? tensor.stored_row(row) : -1;
        const auto bytes = [&](std::span<const std::byte> part, int64_t each) {
          return stored < 0 ? nothing.data() : reinterpret_cast<const uint8_t*>(part.data()) + stored * each;
        };
        rows.data[r] = bytes(tensor.data, row_bytes);
        rows.scales[r] = bytes(tensor.scales, scale_bytes);
        rows.biases[r] = bytes(tensor.biases, scale_bytes);
      }
      int64_t column = 0;
      for (const PanelMatrix& strip : strips) {
        write_panel(tensor, rows, column, strip.columns,
                    reinterpret_cast<uint8_t*>(out + (strip.panel(to) - matrix.bytes)));
        column += strip.columns;
      }
    }
  }
}

}  // namespace

PanelMatrix PackedWeight::pack(int64_t index, int64_t first, int64_t last, std::byte* out) const {
  PanelMatrix part = matrices_[index];
  part.rows = std::min(part.rows, last * kPanelRows) - first * kPanelRows;
  part.panels = last - first;
  part.bytes = out;
  pack_panels(stored_[index], source_, first, last, part, 0, out);
  return part;
}

const std::byte* PackedWeight::stored(int64_t index, int64_t first, int64_t last) const {
  const StoredTensor& tensor = stored_[index];
  return tensor.data.data() + stored_rows(tensor, first, last).first * tensor.row_bytes();
}

void PackedWeight::row(int64_t row, float* out) const {
  if (packed()) return unpack_row(matrix(), row, out);
  const arena::Array<std::byte> panel(static_cast<size_t>(matrix().panel_bytes));
  const int64_t first = row / kPanelRows;
  unpack_row(pack(0, first, first + 1, panel.data()), row % kPanelRows, out);
}

void Packer::run(Pool& pool, const std::function<void()>& beside) {
  // Panels [first, last) of an expert.
  struct Job {
    const PackedWeight* weight;
    int64_t expert, first, last;
  };
  // As much as a huge page holds: two threads that meet in one would both have to fill it with zeros.
  constexpr int64_t kJobBytes = int64_t{2} << 20;
  std::vector<Job> jobs;
  for (const auto& weight : weights_) {
    for (int64_t e = 0; e < weight->experts(); ++e) {
      const PanelMatrix& matrix = weight->matrix(e);
      const int64_t step = 1 + kJobBytes / (matrix.panel_bytes + 1);
      for (int64_t first = 0; first < matrix.panels; first += step)
        jobs.push_back({weight.get(), e, first, std::min(matrix.panels, first + step)});
    }
  }
  std::atomic<bool> failed{false};
  pool.run(std::ssize(jobs) + 1, [&](int64_t index) {
    if (failed) return;
    try {
      if (index == 0) {
        if (beside) beside();
        return;
      }
      const auto& [weight, expert, first, last] = jobs[static_cast<size_t>(index - 1)];
      const StoredTensor& tensor = weight->stored_[expert];
      const PanelMatrix& matrix = weight->matrix(expert);
      std::byte* data = weight->data_.get();
      pack_panels(tensor, weight->source_, first, last, matrix, first, data + (matrix.bytes - data));
      each_part(tensor, first, last, weight->source_.release);
    } catch (...) {
      failed = true;
      throw;
    }
  });
  for (const auto& weight : weights_) {
    weight->stored_.clear();
    weight->source_ = {};
  }
  weights_.clear();
}

std::shared_ptr<const PackedWeight> pack_tensors(std::span<const StoredTensor> experts, Pool& pool) {
  PanelMemory memory(0);
  auto weight = std::make_shared<PackedWeight>(experts, memory, Source());
  Packer packer;
  packer.add(weight);
  packer.run(pool);
  return weight;
}

}  // namespace lockstep::quant

#include "quant/pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
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

PackedWeight::PackedWeight(std::span<const StoredTensor> experts, PanelMemory& memory, ReadBytes read)
    : stored_(experts.begin(), experts.end()), read_(std::move(read)) {
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

// The bytes of a tensor's part that hold the rows at hand.
class Rows {
 public:
  /// row_bytes: of one row; 0 where the tensor has no such part.
  Rows(std::span<const std::byte> part, int64_t row_bytes) : part_(part), row_bytes_(row_bytes) {}

  // Copies rows [begin, end).
  void read(const ReadBytes& read, int64_t begin, int64_t end) {
    const auto size = static_cast<size_t>((end - begin) * row_bytes_);
    if (size == 0) return;
    if (size > size_) bytes_ = arena::Array<std::byte>(size_ = size);
    begin_ = begin;
    read(part_.subspan(static_cast<size_t>(begin * row_bytes_), size), bytes_.data());
  }
  const uint8_t* operator[](int64_t row) const {
    return reinterpret_cast<const uint8_t*>(bytes_.data()) + (row - begin_) * row_bytes_;
  }

 private:
  std::span<const std::byte> part_;
  int64_t row_bytes_;
  int64_t begin_ = 0;
  size_t size_ = 0;
  arena::Array<std::byte> bytes_;  // [size_]
};

// Panels [first, last) of a tensor, which become those of `matrix` from `to` on. out: the bytes of `matrix`.
void pack_panels(const StoredTensor& tensor, const ReadBytes& read, int64_t first, int64_t last,
                 const PanelMatrix& matrix, int64_t to, std::byte* out) {
  constexpr int64_t kReadBytes = int64_t{128} << 10;  // at a time: they stay in the cache
  const int64_t all_rows = tensor.rows();
  const int64_t groups = tensor.group_size > 0 ? tensor.columns() / tensor.group_size : 0;
  const int64_t row_bytes = tensor.row_bytes(), scale_bytes = groups * dtype_block_bytes(tensor.scale_dtype);
  Rows data(tensor.data, row_bytes), scales(tensor.scales, scale_bytes), biases(tensor.biases, scale_bytes);
  const std::vector<uint8_t> nothing(static_cast<size_t>(row_bytes));  // a row that the matrix does not have
  std::vector<PanelMatrix> strips;
  for (int64_t s = 0; s < matrix.strips(); ++s) strips.push_back(matrix.strip(s));
  const int64_t together = 1 + kReadBytes / (kPanelRows * row_bytes + 1);
  for (; first < last; first += together) {
    const int64_t end_panel = std::min(last, first + together);
    // Rows of interleaved heads are somewhere between the first and the last of them.
    int64_t begin = all_rows, end = 0;
    for (int64_t row = first * kPanelRows; row < std::min(all_rows, end_panel * kPanelRows); ++row) {
      begin = std::min(begin, tensor.stored_row(row));
      end = std::max(end, tensor.stored_row(row) + 1);
    }
    data.read(read, begin, end);
    scales.read(read, begin, end);
    biases.read(read, begin, end);
    for (int64_t panel = first; panel < end_panel; ++panel, ++to) {
      PanelRows rows;
      for (int r = 0; r < kPanelRows; ++r) {
        const int64_t row = panel * kPanelRows + r;
        const bool there = row < all_rows;
        const int64_t at = there ? tensor.stored_row(row) : begin;
        rows.data[r] = there ? data[at] : nothing.data();
        rows.scales[r] = there ? scales[at] : nothing.data();
        rows.biases[r] = there ? biases[at] : nothing.data();
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
  pack_panels(stored_[index], read_, first, last, part, 0, out);
  return part;
}

void PackedWeight::row(int64_t row, float* out) const {
  if (packed()) return unpack_row(matrix(), row, out);
  const arena::Array<std::byte> panel(static_cast<size_t>(matrix().panel_bytes));
  const int64_t first = row / kPanelRows;
  unpack_row(pack(0, first, first + 1, panel.data()), row % kPanelRows, out);
}

void Packer::run(Pool& pool, Until until, const std::function<void()>& beside) {
  // Panels [first, last) of an expert.
  struct Job {
    size_t weight;
    int64_t expert, first, last;
    bool done;
  };
  // As much as a huge page holds: two threads that meet in one would both have to fill it with zeros.
  constexpr int64_t kJobBytes = int64_t{2} << 20;
  std::vector<Job> jobs;
  for (size_t w = 0; w < weights_.size(); ++w) {
    for (int64_t e = 0; e < weights_[w]->experts(); ++e) {
      const PanelMatrix& matrix = weights_[w]->matrix(e);
      const int64_t step = 1 + kJobBytes / (matrix.panel_bytes + 1);
      for (int64_t first = 0; first < matrix.panels; first += step)
        jobs.push_back({w, e, first, std::min(matrix.panels, first + step), false});
    }
  }
  std::atomic<bool> enough{false};
  pool.run(std::ssize(jobs) + 1, [&](int64_t index) {
    if (enough) return;
    try {
      if (index == 0) {
        if (beside) beside();
        enough = until == Until::beside_ends;
        return;
      }
      Job& job = jobs[static_cast<size_t>(index - 1)];
      const PackedWeight& weight = *weights_[job.weight];
      const PanelMatrix& matrix = weight.matrix(job.expert);
      std::byte* data = weight.data_.get();
      pack_panels(weight.stored_[job.expert], weight.read_, job.first, job.last, matrix, job.first,
                  data + (matrix.bytes - data));
      job.done = true;
    } catch (...) {
      enough = true;
      throw;
    }
  });
  std::vector<bool> whole(weights_.size(), true);
  for (const Job& job : jobs) whole[job.weight] = whole[job.weight] && job.done;
  for (size_t w = 0; w < weights_.size(); ++w) {
    if (!whole[w]) continue;
    weights_[w]->stored_.clear();
    weights_[w]->read_ = {};
  }
  std::erase_if(weights_, [](const auto& weight) { return weight->packed(); });
}

std::shared_ptr<const PackedWeight> pack_tensors(std::span<const StoredTensor> experts, Pool& pool) {
  PanelMemory memory(0);
  const auto copy = [](std::span<const std::byte> part, std::byte* out) {
    std::memcpy(out, part.data(), part.size());
  };
  auto weight = std::make_shared<PackedWeight>(experts, memory, copy);
  Packer packer;
  packer.add(weight);
  packer.run(pool);
  return weight;
}

}  // namespace lockstep::quant

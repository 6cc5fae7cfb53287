// Packing stored tensors into panels (layouts: quant/panel.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "lockstep/checkpoint.h"
#include "quant/panel.h"
#include "thread/pool.h"

namespace lockstep::quant {

/// Address space for panels, in regions of huge pages that only take memory where they are written.
class PanelMemory {
 public:
  /// Regions of `region_bytes`, or of what is asked for where that is more.
  explicit PanelMemory(size_t region_bytes) : region_bytes_(region_bytes) {}
  /// `bytes` of zeros, aligned to 64, which live as long as the result. Error: std::bad_alloc.
  std::shared_ptr<std::byte> take(size_t bytes);

 private:
  size_t region_bytes_;
  std::shared_ptr<std::byte> region_;
  size_t size_ = 0;  // of the region
  size_t used_ = 0;
};

/// Owns the panels of one or several matrices of equal shape (the experts of a layer).
class PackedWeight {
 public:
  PackedWeight() = default;
  /// Room for tensors [rows, columns] of one shape, one for each expert, whose element types may differ; all
  /// zeros until a `Packer` fills it. Error `unsupported` for an element type that has no panel format.
  PackedWeight(std::span<const StoredTensor> experts, PanelMemory& memory);
  /// The same, filled at once from tensors that lie in memory.
  PackedWeight(std::span<const StoredTensor> experts, Pool& pool);

  int64_t experts() const { return experts_; }
  /// Expert `index`; the only matrix has index 0.
  const PanelMatrix& matrix(int64_t index = 0) const { return matrices_[index]; }
  int64_t rows() const { return matrices_[0].rows; }
  int64_t columns() const { return matrices_[0].columns; }
  /// Bytes kept in memory.
  int64_t bytes() const { return bytes_; }
  /// Bytes that the file uses for it.
  int64_t stored_bytes() const { return stored_bytes_; }

 private:
  friend class Packer;

  int64_t experts_ = 0;
  int64_t bytes_ = 0;
  int64_t stored_bytes_ = 0;
  std::shared_ptr<std::byte> data_;  // [experts, panels, panel_bytes]
  std::vector<PanelMatrix> matrices_;
};

/// Copies `part`, a piece of a tensor's stored bytes, to `out`. Called from several threads at once.
using ReadBytes = std::function<void(std::span<const std::byte> part, std::byte* out)>;

/// Packs many weights in one go, so that no thread waits between two of them.
class Packer {
 public:
  explicit Packer(ReadBytes read) : read_(std::move(read)) {}
  /// Notes that `weight` is to be filled from `experts`, of which it was made. Rows of a panel beyond the
  /// last of the matrix become zeros. The weight and the bytes of the tensors must live until `run` has
  /// returned.
  void add(const PackedWeight& weight, std::span<const StoredTensor> experts);
  /// Fills all that was added. `beside` is the first piece of work, for one thread; `progress`, called from
  /// this thread, takes the share of panels that are done. Both may be empty.
  void run(Pool& pool, const std::function<void()>& beside = {},
           const std::function<void(double)>& progress = {});

 private:
  /// Panels [first, last) of one tensor.
  struct Job {
    StoredTensor tensor;
    int64_t first, last;
    int64_t panel_bytes;
    std::byte* out;  // [last - first, panel_bytes]
  };
  void pack(const Job& job) const;

  ReadBytes read_;
  std::vector<Job> jobs_;
};

}  // namespace lockstep::quant

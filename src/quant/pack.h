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

/// Where stored tensors come from: told of the pieces of their bytes that are read, by several threads at
/// once.
struct Source {
  /// `part` is read next.
  std::function<void(std::span<const std::byte> part)> fetch = [](auto) {};
  /// `part` was read, and need not stay in memory.
  std::function<void(std::span<const std::byte> part)> release = [](auto) {};
};

/// Owns the panels of one or several matrices of equal shape (the experts of a layer). Before a `Packer` has
/// filled them it makes those that are asked for.
class PackedWeight {
 public:
  /// Room for tensors [rows, columns] of one shape, one for each expert, whose element types may differ.
  /// Their bytes must live until it is packed. Error `unsupported` for an element type that has no panel
  /// format.
  PackedWeight(std::span<const StoredTensor> experts, PanelMemory& memory, Source source);

  int64_t experts() const { return experts_; }
  /// Expert `index`; the only matrix has index 0. Its bytes are zeros unless `packed`.
  const PanelMatrix& matrix(int64_t index = 0) const { return matrices_[index]; }
  int64_t rows() const { return matrices_[0].rows; }
  int64_t columns() const { return matrices_[0].columns; }
  /// Bytes that the file uses for it.
  int64_t stored_bytes() const { return stored_bytes_; }

  bool packed() const { return stored_.empty(); }
  /// Of a weight that is not packed: panels [first, last) of an expert, as a matrix of their own in `out`.
  /// out: [strips, last - first, panel_bytes of the strip]. Rows of a panel beyond the last of the matrix
  /// become zeros. Safe from several threads; errors are those of the source.
  PanelMatrix pack(int64_t index, int64_t first, int64_t last, std::byte* out) const;
  /// Of a weight that is not packed: where the stored bytes begin from which panels [first, last) are made.
  const std::byte* stored(int64_t index, int64_t first, int64_t last) const;
  /// Row `row` of the only matrix as f32 (`unpack_row`), packed or not. out: [columns].
  void row(int64_t row, float* out) const;

 private:
  friend class Packer;

  int64_t experts_ = 0;
  int64_t stored_bytes_ = 0;
  std::shared_ptr<std::byte> data_;  // [experts, strips, panels, panel_bytes of the strip]
  std::vector<PanelMatrix> matrices_;
  std::vector<StoredTensor> stored_;  // what the panels are made from; none once they are
  Source source_;
};

/// Packs many weights in one go, so that no thread waits between two of them.
class Packer {
 public:
  void add(std::shared_ptr<PackedWeight> weight) { weights_.push_back(std::move(weight)); }
  /// Packs them all, in the order in which they were added; nobody may use them meanwhile. `beside`, which
  /// may be empty, is the first piece of work, for one thread. Errors are those of the source; then it can
  /// be tried again.
  void run(Pool& pool, const std::function<void()>& beside = {});

 private:
  std::vector<std::shared_ptr<PackedWeight>> weights_;
};

/// A weight of tensors that lie in memory (see `PackedWeight`), packed.
std::shared_ptr<const PackedWeight> pack_tensors(std::span<const StoredTensor> experts, Pool& pool);

}  // namespace lockstep::quant

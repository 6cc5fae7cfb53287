// Packing stored tensors into panels (layouts: quant/panel.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "lockstep/checkpoint.h"
#include "quant/panel.h"
#include "thread/pool.h"

namespace lockstep::quant {

/// Owns the panels of one or several matrices of equal shape (the experts of a layer).
class PackedWeight {
 public:
  PackedWeight() = default;
  /// Packs tensors [rows, columns] of one shape, one for each expert, in parallel. Their element types
  /// may differ. Rows beyond the last one of a panel are zero. Error `unsupported` for an element type
  /// that has no panel format.
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
  struct Unmap {
    size_t bytes;
    void operator()(std::byte* data) const;
  };

  int64_t experts_ = 0;
  int64_t bytes_ = 0;
  int64_t stored_bytes_ = 0;
  std::unique_ptr<std::byte[], Unmap> data_{nullptr, Unmap{0}};
  std::vector<PanelMatrix> matrices_;
};

}  // namespace lockstep::quant

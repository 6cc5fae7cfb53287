#include "lockstep/checkpoint.h"

namespace lockstep {

int64_t StoredTensor::rows() const {
  int64_t product = 1;
  for (int axis = 0; axis < shape.rank() - 1; ++axis) product *= shape[axis];
  return product;
}

// Within a head of D rows, interleaved order is 0, D/2, 1, D/2 + 1, ...: row i of the first half lies
// at 2i, row i of the second at 2i + 1.
int64_t StoredTensor::stored_row(int64_t row) const {
  if (interleaved_heads == 0) return row;
  const int64_t count = shape.rank() == 1 ? shape[0] : rows();
  const int64_t head_rows = count / interleaved_heads;
  const int64_t half = head_rows / 2;
  const int64_t within = row % head_rows;
  return row - within + 2 * (within % half) + within / half;
}

int64_t StoredTensor::row_bytes() const { return columns() / dtype_block(dtype) * dtype_block_bytes(dtype); }

int64_t StoredTensor::stored_bytes() const {
  return rows() * row_bytes() + static_cast<int64_t>(scales.size() + biases.size());
}

StoredTensor StoredTensor::slice(int64_t index) const {
  const int64_t experts = shape[0];
  StoredTensor part = *this;
  part.name += "[" + std::to_string(index) + "]";
  part.source += "[" + std::to_string(index) + "]";
  part.shape = {shape[1], shape[2]};
  const auto share = [&](std::span<const std::byte> all) {
    const size_t bytes = all.size() / static_cast<size_t>(experts);
    return all.subspan(static_cast<size_t>(index) * bytes, bytes);
  };
  part.data = share(data);
  part.scales = share(scales);
  part.biases = share(biases);
  return part;
}

StoredTensor StoredTensor::row_range(int64_t first, int64_t count) const {
  StoredTensor part = *this;
  part.shape = {count, shape[1]};
  part.data =
      data.subspan(static_cast<size_t>(first * row_bytes()), static_cast<size_t>(count * row_bytes()));
  return part;
}

}  // namespace lockstep

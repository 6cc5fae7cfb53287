#include "lockstep/tensor.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "tensor/arena.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

struct DTypeInfo {
  std::string_view name;
  int64_t block;
  int64_t bytes;
};

// In the order of DType.
constexpr DTypeInfo kDTypes[] = {
    {"f32", 1, 4},    {"f16", 1, 2},      {"bf16", 1, 2},     {"f64", 1, 8},      {"i8", 1, 1},
    {"i16", 1, 2},    {"i32", 1, 4},      {"i64", 1, 8},      {"u8", 1, 1},       {"u32", 1, 4},
    {"bool", 1, 1},   {"q4_0", 32, 18},   {"q4_1", 32, 20},   {"q5_0", 32, 22},   {"q5_1", 32, 24},
    {"q8_0", 32, 34}, {"q4_k", 256, 144}, {"q5_k", 256, 176}, {"q6_k", 256, 210}, {"mlx_q4", 8, 4},
    {"mlx_q8", 4, 4},
};

Shape dense_strides(const Shape& shape) {
  Shape strides = shape;
  int64_t step = 1;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= shape[axis];
  }
  return strides;
}

}  // namespace

std::string_view dtype_name(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }
std::optional<DType> find_dtype(std::string_view name) {
  for (size_t i = 0; i < std::size(kDTypes); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  return {};
}
int64_t dtype_block(DType dtype) { return kDTypes[static_cast<int>(dtype)].block; }
int64_t dtype_block_bytes(DType dtype) { return kDTypes[static_cast<int>(dtype)].bytes; }

Shape::Shape(std::initializer_list<int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const int64_t> dims) {
  if (dims.size() > kMaxRank) {
    fail(ErrorCode::invalid_argument, "[shape] rank: expected at most {} axes, got {}", kMaxRank,
         dims.size());
  }
  std::copy(dims.begin(), dims.end(), dims_.begin());
  rank_ = static_cast<int>(dims.size());
}

int64_t Shape::size() const {
  int64_t product = 1;
  for (int64_t dim : *this) product *= dim;
  return product;
}

bool Shape::operator==(const Shape& other) const {
  return std::equal(begin(), end(), other.begin(), other.end());
}

std::string Shape::str() const {
  std::string text = "[";
  for (int axis = 0; axis < rank_; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(dims_[axis]);
  }
  return text + "]";
}

Tensor::Tensor(const Shape& shape) : shape_(shape) {
  const size_t bytes = static_cast<size_t>(shape.size()) * sizeof(float);
  data_ = {static_cast<float*>(arena::acquire(bytes)), Release{bytes}};
}

void Tensor::Release::operator()(float* data) const { arena::release(data, bytes); }

Tensor Tensor::zeros(const Shape& shape) {
  Tensor tensor(shape);
  std::memset(tensor.data(), 0, tensor.values().size_bytes());
  return tensor;
}

Tensor Tensor::from(const Shape& shape, std::span<const float> values) {
  if (static_cast<int64_t>(values.size()) != shape.size()) {
    fail(ErrorCode::invalid_argument, "[tensor] values: expected {} for shape {}, got {}", shape.size(),
         shape.str(), values.size());
  }
  Tensor tensor(shape);
  std::copy(values.begin(), values.end(), tensor.data());
  return tensor;
}

Tensor Tensor::clone() const { return from(shape_, values()); }

Tensor Tensor::reshaped(const Shape& shape) && {
  if (shape.size() != size()) {
    fail(ErrorCode::invalid_argument, "[tensor] reshape: expected {} elements, got shape {}", size(),
         shape.str());
  }
  Tensor result = std::move(*this);
  result.shape_ = shape;
  return result;
}

View::View(const Tensor& tensor) : View(tensor.data(), tensor.shape()) {}

View::View(const float* data, const Shape& shape) : View(data, shape, dense_strides(shape)) {}

View::View(const float* data, const Shape& shape, const Shape& strides)
    : data(data), shape(shape), strides(strides) {}

View View::transposed(int axis_a, int axis_b) const {
  View view = *this;
  std::swap(view.shape[axis_a], view.shape[axis_b]);
  std::swap(view.strides[axis_a], view.strides[axis_b]);
  return view;
}

Tensor View::copy() const {
  Tensor result(shape);
  std::array<int64_t, Shape::kMaxRank> index{};
  for (float& value : result.values()) {
    int64_t offset = 0;
    for (int axis = 0; axis < shape.rank(); ++axis) offset += index[axis] * strides[axis];
    value = data[offset];
    for (int axis = shape.rank() - 1; axis >= 0 && ++index[axis] == shape[axis]; --axis) {
      index[axis] = 0;
    }
  }
  return result;
}

}  // namespace lockstep

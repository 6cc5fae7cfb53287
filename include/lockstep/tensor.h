// Element types, shapes, and the tensors that hold activations.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace lockstep {

/// Element type of a stored or computed tensor. The block formats are those of GGUF (ggml) and the
/// affine ones of MLX, whose codes, scales and biases are three arrays in the file.
enum class DType : uint8_t {
  f32,
  f16,
  bf16,
  f64,
  i8,
  i16,
  i32,
  i64,
  u8,
  u32,
  boolean,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q4_k,
  q5_k,
  q6_k,
  mlx_q4,
  mlx_q8,
};

/// Lower-case name of a dtype, as `inspect` prints it ("bf16", "q4_k").
std::string_view dtype_name(DType dtype);
/// The dtype of that name; nothing: there is none.
std::optional<DType> find_dtype(std::string_view name);
/// Elements in one block: 1 for plain types, 32 or 256 for block formats; MLX: codes in one u32.
int64_t dtype_block(DType dtype);
/// Bytes of one block (MLX: of the codes alone, 4).
int64_t dtype_block_bytes(DType dtype);

/// Up to eight extents, outermost first. A plain value: no allocation.
class Shape {
 public:
  static constexpr int kMaxRank = 8;

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  explicit Shape(std::span<const int64_t> dims);

  int rank() const { return rank_; }
  /// Extent of an axis; negative axes count from the end, as in Python.
  int64_t operator[](int axis) const { return dims_[axis < 0 ? axis + rank_ : axis]; }
  int64_t& operator[](int axis) { return dims_[axis < 0 ? axis + rank_ : axis]; }
  const int64_t* begin() const { return dims_.data(); }
  const int64_t* end() const { return dims_.data() + rank_; }
  /// Product of the extents; 1 for rank 0.
  int64_t size() const;
  bool operator==(const Shape& other) const;
  /// "[2, 4, 8]"
  std::string str() const;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

/// Dense row-major f32 activations that own their storage (64-byte aligned). Move-only: a copy of
/// activations is never an accident; `clone()` says it.
class Tensor {
 public:
  Tensor() = default;
  /// Uninitialised storage of the given shape.
  explicit Tensor(const Shape& shape);
  static Tensor zeros(const Shape& shape);
  static Tensor from(const Shape& shape, std::span<const float> values);
  Tensor clone() const;

  const Shape& shape() const { return shape_; }
  int64_t size() const { return shape_.size(); }
  bool empty() const { return data_ == nullptr; }
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  std::span<float> values() { return {data(), static_cast<size_t>(size())}; }
  std::span<const float> values() const { return {data(), static_cast<size_t>(size())}; }

  /// Elements in one index of axis 0, and the start of index `i` of axis 0.
  int64_t row_size() const { return shape_[0] == 0 ? 0 : size() / shape_[0]; }
  float* row(int64_t i) { return data() + i * row_size(); }
  const float* row(int64_t i) const { return data() + i * row_size(); }

  /// The same values under another shape of equal size.
  Tensor reshaped(const Shape& shape) &&;

 private:
  struct Release {
    size_t bytes;
    void operator()(float* data) const;
  };
  Shape shape_;
  std::unique_ptr<float[], Release> data_{nullptr, Release{0}};
};

/// A read-only strided view of f32 values, strides in elements: what the operations of fast.h take.
struct View {
  const float* data = nullptr;
  Shape shape;
  Shape strides;

  View() = default;
  View(const Tensor& tensor);  // NOLINT(google-explicit-constructor): a tensor is its own view
  View(const float* data, const Shape& shape);
  View(const float* data, const Shape& shape, const Shape& strides);

  /// The view with two axes exchanged.
  View transposed(int axis_a, int axis_b) const;
  /// A dense copy.
  Tensor copy() const;
};

}  // namespace lockstep

// Products with stored weights: linear layers, embeddings, and experts.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "lockstep/tensor.h"
#include "nn/runtime.h"
#include "quant/pack.h"

namespace lockstep::nn {

/// y = x W^T + b. The weight is packed; several layers may share it (tied embeddings).
struct Linear {
  const Runtime* runtime = nullptr;
  std::shared_ptr<const quant::PackedWeight> weight;  // [out, in]
  std::vector<float> bias;                            // [out] or empty

  int64_t out_features() const { return weight->rows(); }
  int64_t in_features() const { return weight->columns(); }
};

/// x: [T, in] -> [T, out].
Tensor linear(const Tensor& x, const Linear& layer);
/// Several layers on the same rows in one pass over the threads: Q, K and V; gate and up.
std::vector<Tensor> linear(const Tensor& x, std::initializer_list<const Linear*> layers);

/// Rows of the embedding matrix. -> [ids.size(), hidden].
Tensor embedding(std::span<const int32_t> ids, const Linear& table);

/// The experts of a mixture: SwiGLU feed-forward networks of equal shape.
struct SwitchGLU {
  const Runtime* runtime = nullptr;
  std::shared_ptr<const quant::PackedWeight> gate;  // [E][intermediate, hidden]
  std::shared_ptr<const quant::PackedWeight> up;    // [E][intermediate, hidden]
  std::shared_ptr<const quant::PackedWeight> down;  // [E][hidden, intermediate]
};

/// Rows of activations prepared for products: f32, and 16-bit fixed point if any weight wants it.
class Activations {
 public:
  Activations(const Runtime& runtime, const float* x, int64_t rows, int64_t columns, bool fixed);

  const float* x() const { return x_; }
  int64_t columns() const { return columns_; }
  /// The fixed-point form of rows [first, ...).
  kernels::Fixed16 fixed(int64_t first) const;

 private:
  const float* x_;
  int64_t columns_;
  int64_t blocks_ = 0;
  std::vector<int8_t> high_, low_;  // [T, blocks * 32]
  std::vector<float> scale_;        // [T, blocks]
  std::vector<int32_t> sum_;        // [T, blocks, 2]
};

/// Whether products with this weight take fixed-point activations at this precision.
bool wants_fixed(const Runtime& runtime, const quant::PackedWeight& weight);

/// One product of a set that runs together.
struct Product {
  const quant::PanelMatrix* weight = nullptr;
  const Activations* x = nullptr;
  int64_t first_row = 0;  // of x
  int64_t rows = 0;
  float* y = nullptr;  // [rows, weight->rows]
  bool fixed = false;
};
void multiply(const Runtime& runtime, std::span<const Product> products);

}  // namespace lockstep::nn

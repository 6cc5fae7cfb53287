// Products with stored weights: linear layers, embeddings, and experts.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "lockstep/tensor.h"
#include "nn/precision.h"
#include "nn/runtime.h"
#include "quant/pack.h"
#include "tensor/arena.h"

namespace lockstep::nn {

/// y = x W^T + b. The weight is packed; several layers may share it (tied embeddings).
struct Linear {
  const Runtime* runtime = nullptr;
  Role role = Role::q;
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

/// Rows of activations in the forms that the products at hand take.
class Activations {
 public:
  /// x: [rows, columns], kept alive by the caller.
  Activations(const Runtime& runtime, const Tensor& x)
      : runtime_(runtime), x_(x.data()), rows_(x.shape()[0]), columns_(x.row_size()) {}
  /// Row i is row order[i] of x. Both are kept alive by the caller.
  Activations(const Runtime& runtime, const Tensor& x, std::span<const int32_t> order)
      : runtime_(runtime),
        x_(x.data()),
        order_(order),
        rows_(static_cast<int64_t>(order.size())),
        columns_(x.row_size()) {}

  /// Makes the form for products of `rows` rows with a weight unless it is there.
  void prepare(InputForm form, const quant::PanelMatrix& weight, int64_t rows);
  /// Points a product of args.rows rows with args.weight at rows [first, ...) from `column`, a multiple of
  /// 32, on, in a form that was prepared for it.
  void bind(InputForm form, int64_t first, int64_t column, kernels::LinearArgs& args) const;

 private:
  template <typename Block>
  using Rows = std::optional<arena::Array<Block>>;  // [T, blocks]
  template <typename Block>
  struct Fixed {
    Rows<Block> rows;
    std::vector<float> start;  // [T]: see LinearArgs
  };

  /// round(t, x, y): of row t.
  template <typename Block, typename Round>
  void make(Rows<Block>& rows, int64_t width, Round round) const;
  /// round(x, y), which returns where sums of the row start.
  template <typename Block, typename Round>
  void make_fixed(Fixed<Block>& fixed, Round round) const;
  int64_t blocks() const { return (columns_ + quant::kBlock - 1) / quant::kBlock; }
  int64_t even_columns() const { return (columns_ + 1) / 2 * 2; }

  const Runtime& runtime_;
  const float* x_;                      // [*, columns]
  std::span<const int32_t> order_;      // [T], or empty: as they lie
  int64_t rows_, columns_;              // rows_: T
  Rows<float> f32_;                     // [T, columns]; of rows in an order
  Fixed<kernels::Fixed16> fixed16_[2];  // by takes_many_fixed16
  Fixed<kernels::Fixed8> fixed8_[2];    // by takes_many_fixed8
  Rows<uint16_t> bf16_;                 // [T, even_columns]
};

/// One product of a set that runs together.
struct Product {
  const quant::PackedWeight* weight = nullptr;
  int64_t expert = 0;  // of the weight
  const Activations* x = nullptr;
  InputForm form = InputForm::f32;  // prepared
  int64_t first_row = 0;            // of x
  int64_t rows = 0;
  float* y = nullptr;  // [rows, weight->rows()]
};
void multiply(const Runtime& runtime, std::span<const Product> products);

}  // namespace lockstep::nn

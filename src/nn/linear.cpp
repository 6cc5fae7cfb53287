#include "nn/linear.h"

#include <algorithm>

#include "quant/blocks.h"

namespace lockstep::nn {

bool wants_fixed(const Runtime& runtime, const quant::PackedWeight& weight) {
  return runtime.precision == Precision::exact && quant::code_format(weight.matrix().dtype).bits > 0;
}

Activations::Activations(const Runtime& runtime, const float* x, int64_t rows, int64_t columns, bool fixed)
    : x_(x), columns_(columns) {
  if (!fixed) return;
  blocks_ = (columns + quant::kBlock - 1) / quant::kBlock;
  high_.resize(static_cast<size_t>(rows * blocks_ * quant::kBlock));
  low_.resize(high_.size());
  scale_.resize(static_cast<size_t>(rows * blocks_));
  sum_.resize(static_cast<size_t>(rows * blocks_ * 2));
  runtime.for_rows(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      runtime.kernels->to_fixed16(x + t * columns, columns, &high_[t * blocks_ * quant::kBlock],
                                  &low_[t * blocks_ * quant::kBlock], &scale_[t * blocks_],
                                  &sum_[t * blocks_ * 2]);
    }
  });
}

kernels::Fixed16 Activations::fixed(int64_t first) const {
  return {blocks_, high_.data() + first * blocks_ * quant::kBlock,
          low_.data() + first * blocks_ * quant::kBlock, scale_.data() + first * blocks_,
          sum_.data() + first * blocks_ * 2};
}

void multiply(const Runtime& runtime, std::span<const Product> products) {
  int64_t panels = 0;
  for (const Product& product : products) panels += product.weight->panels;
  // Small chunks, so that a busy neighbour delays little; not so small that handing out costs.
  const int64_t step = std::clamp<int64_t>(panels / (runtime.pool->threads() * 8), 1, 16);

  struct Chunk {
    const Product* product;
    int64_t begin;
    int64_t end;
  };
  std::vector<Chunk> chunks;
  for (const Product& product : products) {
    for (int64_t p = 0; p < product.weight->panels; p += step) {
      chunks.push_back({&product, p, std::min(product.weight->panels, p + step)});
    }
  }
  runtime.pool->run(static_cast<int64_t>(chunks.size()), [&](int64_t index) {
    const auto& [product, begin, end] = chunks[index];
    kernels::LinearArgs args;
    args.weight = product->weight;
    args.rows = product->rows;
    args.x = product->x->x() + product->first_row * product->x->columns();
    args.x_stride = product->x->columns();
    args.y = product->y;
    args.y_stride = product->weight->rows;
    if (product->fixed) {
      args.fixed = product->x->fixed(product->first_row);
      runtime.kernels->linear_fixed16(args, begin, end);
    } else {
      runtime.kernels->linear_f32(args, begin, end);
    }
  });
}

std::vector<Tensor> linear(const Tensor& x, std::initializer_list<const Linear*> layers) {
  const Runtime& runtime = *(*layers.begin())->runtime;
  const int64_t rows = x.shape()[0];
  const bool any_fixed = std::any_of(layers.begin(), layers.end(), [&](const Linear* layer) {
    return wants_fixed(runtime, *layer->weight);
  });
  const Activations activations(runtime, x.data(), rows, x.row_size(), any_fixed);
  std::vector<Tensor> results;
  std::vector<Product> products;
  for (const Linear* layer : layers) {
    Tensor& y = results.emplace_back(Shape{rows, layer->out_features()});
    products.push_back(
        {&layer->weight->matrix(), &activations, 0, rows, y.data(), wants_fixed(runtime, *layer->weight)});
  }
  multiply(runtime, products);
  size_t index = 0;
  for (const Linear* layer : layers) {
    Tensor& y = results[index++];
    if (layer->bias.empty()) continue;
    for (int64_t t = 0; t < rows; ++t) {
      runtime.kernels->add(y.row(t), layer->bias.data(), layer->out_features());
    }
  }
  return results;
}

Tensor linear(const Tensor& x, const Linear& layer) { return std::move(linear(x, {&layer})[0]); }

Tensor embedding(std::span<const int32_t> ids, const Linear& table) {
  Tensor x({static_cast<int64_t>(ids.size()), table.in_features()});
  for (size_t i = 0; i < ids.size(); ++i) {
    quant::unpack_row(table.weight->matrix(), ids[i], x.row(static_cast<int64_t>(i)));
  }
  return x;
}

}  // namespace lockstep::nn

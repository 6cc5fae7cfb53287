#include "nn/linear.h"

#include <algorithm>

namespace lockstep::nn {

Activations::Fixed Activations::make_fixed(bool wide) const {
  const auto size = static_cast<size_t>(rows_ * blocks());
  Fixed made{arena::Array<int8_t>(size * quant::kBlock), {}, arena::Array<float>(size * (wide ? 1 : 2)),
             arena::Array<int32_t>(size * 2)};
  if (wide) made.low = arena::Array<int8_t>(size * quant::kBlock);
  runtime_.for_rows(rows_, columns_, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * blocks();
      runtime_.kernels->to_fixed(
          x_ + t * columns_, columns_,
          {made.high.data() + at * quant::kBlock, wide ? made.low.data() + at * quant::kBlock : nullptr,
           made.scale.data() + at * (wide ? 1 : 2), made.sum.data() + at * 2});
    }
  });
  return made;
}

void Activations::prepare(InputForm form) {
  if (form == InputForm::fixed16 && !fixed16_) fixed16_ = make_fixed(true);
  if (form == InputForm::fixed8 && !fixed8_) fixed8_ = make_fixed(false);
  if (form == InputForm::bf16 && !bf16_) {
    bf16_ = arena::Array<uint16_t>(static_cast<size_t>(rows_ * even_columns()));
    runtime_.for_rows(rows_, columns_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        runtime_.kernels->to_bf16(x_ + t * columns_, columns_, bf16_->data() + t * even_columns());
    });
  }
}

void Activations::bind(InputForm form, int64_t first, kernels::LinearArgs& args) const {
  const auto fixed = [&](const Fixed& from, bool wide) -> kernels::FixedPoint {
    const int64_t at = first * blocks();
    return {blocks(), from.high.data() + at * quant::kBlock, wide ? from.low.data() + at * quant::kBlock : nullptr,
            from.scale.data() + at * (wide ? 1 : 2), from.sum.data() + at * 2};
  };
  switch (form) {
    case InputForm::f32:
      args.x = x_ + first * columns_;
      args.x_stride = columns_;
      break;
    case InputForm::fixed16: args.fixed = fixed(*fixed16_, true); break;
    case InputForm::fixed8: args.fixed = fixed(*fixed8_, false); break;
    case InputForm::bf16:
      args.x_bf16 = bf16_->data() + first * even_columns();
      args.x_stride = even_columns();
      break;
  }
}

void multiply(const Runtime& runtime, std::span<const Product> products) {
  int64_t panels = 0;
  for (const Product& product : products) panels += product.weight->panels;
  // Small chunks, so that a busy neighbour delays little; not so small that handing out costs. Even, since
  // kernels take panels in pairs.
  const int64_t step = std::clamp<int64_t>(panels / (runtime.pool->threads() * 16) * 2, 2, 16);

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
    args.y = product->y;
    args.y_stride = product->weight->rows;
    product->x->bind(product->form, product->first_row, args);
    switch (product->form) {
      case InputForm::f32: runtime.kernels->linear_f32(args, begin, end); break;
      case InputForm::bf16: runtime.kernels->linear_bf16(args, begin, end); break;
      default: runtime.kernels->linear_fixed(args, begin, end);
    }
  });
}

std::vector<Tensor> linear(const Tensor& x, std::initializer_list<const Linear*> layers) {
  const Runtime& runtime = *(*layers.begin())->runtime;
  const int64_t rows = x.shape()[0];
  Activations activations(runtime, x.data(), rows, x.row_size());
  std::vector<Tensor> results;
  std::vector<Product> products;
  for (const Linear* layer : layers) {
    Tensor& y = results.emplace_back(Shape{rows, layer->out_features()});
    const InputForm form = input_form(runtime, *layer->weight, layer->role);
    activations.prepare(form);
    products.push_back({&layer->weight->matrix(), &activations, form, 0, rows, y.data()});
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

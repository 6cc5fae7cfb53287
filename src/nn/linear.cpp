#include "nn/linear.h"

#include <algorithm>

namespace lockstep::nn {

template <typename Block, typename Round>
void Activations::make(Rows<Block>& rows, int64_t width, Round round) const {
  if (rows) return;
  rows = arena::Array<Block>(static_cast<size_t>(rows_ * width));
  runtime_.for_rows(rows_, columns_, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = order_.empty() ? t : order_[t];
      round(t, x_ + row * columns_, rows->data() + t * width);
    }
  });
}

template <typename Block, typename Round>
void Activations::make_fixed(Fixed<Block>& fixed, Round round) const {
  if (fixed.rows) return;
  fixed.start.resize(static_cast<size_t>(rows_));
  make(fixed.rows, blocks(), [&](int64_t t, const float* x, Block* y) { fixed.start[t] = round(x, y); });
}

void Activations::prepare(InputForm form, const quant::PanelMatrix& weight, int64_t rows) {
  const kernels::Table& table = *runtime_.kernels;
  const bool many = rows >= table.many_rows_fixed;
  switch (form) {
    case InputForm::f32:
      if (!order_.empty())
        make(f32_, columns_, [&](int64_t, const float* x, float* y) { std::copy_n(x, columns_, y); });
      break;
    case InputForm::fixed16: {
      const bool other = table.takes_many_fixed16(weight.dtype, many);
      make_fixed(fixed16_[other], [&](const float* x, kernels::Fixed16* y) {
        return table.to_fixed16(x, columns_, other, y);
      });
      break;
    }
    case InputForm::fixed8: {
      const bool other = table.takes_many_fixed8(many);
      make_fixed(fixed8_[other],
                 [&](const float* x, kernels::Fixed8* y) { return table.to_fixed8(x, columns_, other, y); });
      break;
    }
    case InputForm::bf16:
      make(bf16_, even_columns(),
           [&](int64_t, const float* x, uint16_t* y) { table.to_bf16(x, columns_, y); });
      break;
  }
}

void Activations::bind(InputForm form, int64_t first, int64_t column, kernels::LinearArgs& args) const {
  args.x_stride = blocks();
  const int64_t block = first * blocks() + column / quant::kBlock;
  const kernels::Table& table = *runtime_.kernels;
  const DType dtype = args.weight->dtype;
  args.many = args.rows >= (form == InputForm::f32 ? table.many_rows : table.many_rows_fixed);
  switch (form) {
    case InputForm::f32:
      args.x = (f32_ ? f32_->data() : x_) + first * columns_ + column;
      args.x_stride = columns_;
      break;
    case InputForm::fixed16: {
      const auto& fixed = fixed16_[table.takes_many_fixed16(dtype, args.many)];
      args.x_fixed16 = fixed.rows->data() + block;
      args.x_start = fixed.start.data() + first;
      break;
    }
    case InputForm::fixed8: {
      const auto& fixed = fixed8_[table.takes_many_fixed8(args.many)];
      args.x_fixed8 = fixed.rows->data() + block;
      args.x_start = fixed.start.data() + first;
      break;
    }
    case InputForm::bf16:
      args.x_bf16 = bf16_->data() + first * even_columns() + column;
      args.x_stride = even_columns();
      break;
  }
}

namespace {

// Rows [begin, end) of a product.
Product some_rows(Product product, int64_t begin, int64_t end) {
  product.first_row += begin;
  product.rows = end - begin;
  product.y += begin * product.weight->rows();
  return product;
}

// Panels [begin, end) of `weight`, all of the product's or some of them, whose first output is y. next: what
// is read afterwards, if that is known.
void multiply_panels(const Runtime& runtime, const Product& product, const quant::PanelMatrix& weight,
                     int64_t begin, int64_t end, float* y, const std::byte* next = nullptr) {
  for (int64_t s = 0; s < weight.strips(); ++s) {
    const quant::PanelMatrix strip = weight.strip(s);
    kernels::LinearArgs args;
    args.weight = &strip;
    args.rows = product.rows;
    args.accumulate = s > 0;
    if (next != nullptr) args.fetched = next + (strip.bytes - weight.bytes);
    args.y = y;
    args.y_stride = product.weight->rows();
    product.x->bind(product.form, product.first_row, s * weight.strip_columns, args);
    switch (product.form) {
      case InputForm::f32: runtime.kernels->linear_f32(args, begin, end); break;
      case InputForm::bf16: runtime.kernels->linear_bf16(args, begin, end); break;
      case InputForm::fixed16: runtime.kernels->linear_fixed16(args, begin, end); break;
      case InputForm::fixed8: runtime.kernels->linear_fixed8(args, begin, end); break;
    }
  }
}

// The same of a weight that is not packed: a few panels at a time, which do not leave the cache.
void pack_and_multiply(const Runtime& runtime, const Product& product, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = int64_t{128} << 10;  // bytes
  const int64_t panel_bytes = product.weight->matrix(product.expert).panel_bytes;
  const int64_t step = 2 + kTogether / (panel_bytes + 1) / 2 * 2;
  const arena::Array<std::byte> panels(static_cast<size_t>(step * panel_bytes));  // [step, panel_bytes]
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = std::min(end, first + step);
    const quant::PanelMatrix part = product.weight->pack(product.expert, first, last, panels.data());
    const std::byte* next = last < end ? product.weight->stored(product.expert, last, last + step) : nullptr;
    multiply_panels(runtime, product, part, 0, last - first, product.y + first * quant::kPanelRows, next);
  }
}

}  // namespace

void multiply(const Runtime& runtime, std::span<const Product> products) {
  struct Chunk {
    Product product;
    int64_t begin, end;  // panels
  };
  int64_t left = 0;  // panels times rows
  for (const Product& product : products)
    left += product.rows * product.weight->matrix(product.expert).panels;
  // Long chunks first, for memory is read fastest in long runs, and ever shorter ones, so that threads end
  // together; the last are some rows of the shortest. Even, since kernels take panels in pairs.
  constexpr int64_t kShortest = 32768;  // bytes, of one row; with many the arithmetic takes longer
  std::vector<Chunk> chunks;
  for (const Product& product : products) {
    if (product.rows == 0) continue;
    const quant::PanelMatrix& weight = product.weight->matrix(product.expert);
    const int64_t shortest = 2 + kShortest / product.rows / (weight.panel_bytes + 1) / 2 * 2;
    const int64_t most_parts = product.weight->packed() ? product.rows / kernels::kRowsTogether : 1;
    for (int64_t p = 0; p < weight.panels; p = chunks.back().end) {
      const int64_t size = left / product.rows / (runtime.pool->threads() * 3 / 2 + 1) / 2 * 2;
      const int64_t end = std::min(weight.panels, p + std::max(shortest, size));
      const int64_t parts = size > shortest ? 1 : std::max<int64_t>(1, most_parts);
      for (int64_t i = 0; i < parts; ++i)
        chunks.push_back(
            {some_rows(product, product.rows * i / parts, product.rows * (i + 1) / parts), p, end});
      left -= product.rows * (end - p);
    }
  }
  runtime.pool->run(static_cast<int64_t>(chunks.size()), [&](int64_t index) {
    const auto& [product, begin, end] = chunks[index];
    if (!product.weight->packed()) return pack_and_multiply(runtime, product, begin, end);
    multiply_panels(runtime, product, product.weight->matrix(product.expert), begin, end, product.y);
  });
}

std::vector<Tensor> linear(const Tensor& x, std::initializer_list<const Linear*> layers) {
  const Runtime& runtime = *(*layers.begin())->runtime;
  const int64_t rows = x.shape()[0];
  Activations activations(runtime, x);
  std::vector<Tensor> results;
  std::vector<Product> products;
  for (const Linear* layer : layers) {
    Tensor& y = results.emplace_back(Shape{rows, layer->out_features()});
    const quant::PanelMatrix& weight = layer->weight->matrix();
    const InputForm form = input_form(runtime, weight, layer->role);
    activations.prepare(form, weight, rows);
    products.push_back({layer->weight.get(), 0, &activations, form, 0, rows, y.data()});
  }
  multiply(runtime, products);
  size_t index = 0;
  for (const Linear* layer : layers) {
    Tensor& y = results[index++];
    if (layer->bias.empty()) continue;
    runtime.for_rows(rows, layer->out_features(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        runtime.kernels->add(y.row(t), layer->bias.data(), layer->out_features());
    });
  }
  return results;
}

Tensor linear(const Tensor& x, const Linear& layer) { return std::move(linear(x, {&layer})[0]); }

Tensor embedding(std::span<const int32_t> ids, const Linear& table) {
  Tensor x({static_cast<int64_t>(ids.size()), table.in_features()});
  table.runtime->for_rows(x.shape()[0], 4 * table.in_features(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) table.weight->row(ids[t], x.row(t));
  });
  return x;
}

}  // namespace lockstep::nn

#include "nn/rows.h"

#include <algorithm>
#include <utility>

namespace lockstep::nn {

void add(Tensor& x, const Tensor& y, const Runtime& runtime) {
  runtime.for_rows(x.shape()[0], x.row_size(), [&](int64_t begin, int64_t end) {
    runtime.kernels->add(x.row(begin), y.row(begin), (end - begin) * x.row_size());
  });
}

Tensor rows(const Tensor& x, std::span<const int32_t> chosen) {
  Tensor result({static_cast<int64_t>(chosen.size()), x.row_size()});
  for (size_t i = 0; i < chosen.size(); ++i) {
    std::copy_n(x.row(chosen[i]), x.row_size(), result.row(static_cast<int64_t>(i)));
  }
  return result;
}

std::array<Tensor, 3> qkv(const Tensor& x, const Linear& q, const Linear& k, const Linear& v,
                          int64_t head_dim) {
  std::vector<Tensor> flat = linear(x, {&q, &k, &v});
  std::array<Tensor, 3> result;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t rows = flat[i].shape()[0];
    const int64_t heads = flat[i].shape()[1] / head_dim;
    result[i] = std::move(flat[i]).reshaped({rows, heads, head_dim});
  }
  return result;
}

}  // namespace lockstep::nn

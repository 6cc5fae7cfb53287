#include "nn/norm.h"

namespace lockstep::nn {

Tensor rms_norm(const Tensor& x, const std::vector<float>& weight, float eps, const Runtime& runtime) {
  Tensor y(x.shape());
  const int64_t width = x.row_size();
  runtime.for_rows(x.shape()[0], 4 * width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      runtime.kernels->rms_norm(x.row(t), weight.data(), eps, width, y.row(t));
    }
  });
  return y;
}

}  // namespace lockstep::nn

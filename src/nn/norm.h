// Root-mean-square normalisation (Zhang and Sennrich 2019; transformers' LlamaRMSNorm).
#pragma once

#include <vector>

#include "lockstep/tensor.h"
#include "nn/runtime.h"

namespace lockstep::nn {

/// x / sqrt(mean(x^2) + eps) * weight, row by row. x: [T, hidden]; weight: [hidden].
Tensor rms_norm(const Tensor& x, const std::vector<float>& weight, float eps, const Runtime& runtime);

}  // namespace lockstep::nn

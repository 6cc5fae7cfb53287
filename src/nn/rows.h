// Small operations on rows of activations.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "lockstep/tensor.h"
#include "nn/linear.h"
#include "nn/runtime.h"

namespace lockstep::nn {

/// x += y, elements alike.
void add(Tensor& x, const Tensor& y, const Runtime& runtime);

/// The chosen rows of x [T, ...], in that order.
Tensor rows(const Tensor& x, std::span<const int32_t> chosen);

/// Queries, keys and values of the rows of x [T, hidden], in one pass: [T, H, D], [T, Hkv, D] twice.
std::array<Tensor, 3> qkv(const Tensor& x, const Linear& q, const Linear& k, const Linear& v,
                          int64_t head_dim);

}  // namespace lockstep::nn

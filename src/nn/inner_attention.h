// What lies within attention, for observers: the rows of the cache, scores and probabilities. Not on the way
// of a run without one.
#pragma once

#include "generate/batch.h"
#include "lockstep/tensor.h"
#include "lockstep/trace.h"
#include "nn/runtime.h"

namespace lockstep::nn {

struct CacheRows {
  Tensor k, v;  // [T, Hkv, D]
};
/// The rows of a pass that has been appended, as they are read back. shape: [T, Hkv, D].
CacheRows cache_rows(const LayerCache& cache, const Shape& shape, const Runtime& runtime);

/// softmax(scale q K^T) V with scores and probabilities shown, [T, H, K]: K is the number of keys of the
/// longest session, and what a row cannot see is 0. q: [T, H, D] -> [T, H, D].
Tensor plain_attention(const Tensor& q, const LayerCache& cache, float scale, const Runtime& runtime,
                       Taps& tap);

}  // namespace lockstep::nn

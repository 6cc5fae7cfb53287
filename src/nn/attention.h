// Scaled dot-product attention over a KV cache (Vaswani et al. 2017; grouped queries: Ainslie et
// al. 2023), tile by tile with a running softmax (Milakov and Gimelshein 2018).
#pragma once

#include "generate/batch.h"
#include "lockstep/tensor.h"
#include "lockstep/trace.h"
#include "nn/runtime.h"

namespace lockstep::nn {

/// Stores the rows' keys and values [T, Hkv, D], each in its own session's cache. Inner sites: k_cache,
/// v_cache.
void append(const LayerCache& cache, const Tensor& k, const Tensor& v, const Runtime& runtime, Taps& tap);

/// q: [T, H, D] -> [T, H, D]. Each row attends to its own session, to positions up to its own and,
/// with a window, to the last `window` of them. Query head h uses KV head h / (H / Hkv). Inner sites: scores,
/// probs; an observer that changes them gets the plain form, one softmax over all keys.
Tensor attention(const Tensor& q, const LayerCache& cache, float scale, const Runtime& runtime, Taps& tap);

}  // namespace lockstep::nn

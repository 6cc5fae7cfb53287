// Single operations with the signatures of mlx.core.fast, on strided f32 views. Each checks its
// arguments and then computes plainly: they are the specification of the kernels that models use.
//
// Shapes: B batch, H query heads, Hkv KV heads, L positions, D head dimension. Wrong shapes are an
// Error `invalid_argument` that names the operation, the argument, and what it expected.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "lockstep/tensor.h"

namespace lockstep::fast {

/// Position of the first of the L rows: one for all, or, from rank 3 on, one for each index of
/// axis 0.
using Offset = std::variant<int64_t, std::span<const int32_t>>;

/// Rotary position embedding (Su et al. 2021). x: [..., L, D] of rank 2 or more; every leading
/// index is rotated. The first `dims` (even, 2 to D) of D are rotated, the others copied. Pairs are
/// (2i, 2i + 1) if `traditional`, else (i, i + dims / 2). Angle of pair i at position p:
/// scale * p / freqs[i], where freqs[i] = base^(2i / dims) unless `freqs` [dims / 2] is given;
/// exactly one of `base` and `freqs` must be. Each step up to the angle rounds to f32, as
/// transformers does. -> as x, dense.
Tensor rope(const View& x, int64_t dims, bool traditional, std::optional<float> base, float scale,
            const Offset& offset, std::span<const float> freqs = {});

/// x / sqrt(mean(x^2) + eps) * weight over the last axis. weight: [D] or empty for ones. -> as x.
Tensor rms_norm(const View& x, std::span<const float> weight, float eps);

/// (x - mean) / sqrt(variance + eps) * weight + bias over the last axis; weight, bias: [D] or
/// empty. -> as x.
Tensor layer_norm(const View& x, std::span<const float> weight, std::span<const float> bias, float eps);

/// Which keys a query sees: those that every part of the mask lets through.
struct Mask {
  bool causal = false;             ///< key j of Lk for query i of L if j <= i + Lk - L (lower right aligned)
  int64_t window = 0;              ///< > 0: only if j > i + Lk - L - window
  const View* additive = nullptr;  ///< added to the scores; broadcasts to [B, H, L, Lk]
  /// Broadcasts to [B, H, L, Lk]; keys with 0 are not seen.
  std::span<const uint8_t> boolean;
  Shape boolean_shape;
};

/// softmax(scale * q k^T + mask) v. q: [B, H, L, D]; k: [B, Hkv, Lk, D]; v: [B, Hkv, Lk, Dv]; query
/// head h uses KV head h / (H / Hkv). sinks: [H] or empty, a further score per head that takes its
/// share of the softmax and has no value. A row that sees no key gives 0; the values of keys that
/// are not seen do not matter, NaN included. -> [B, H, L, Dv].
Tensor scaled_dot_product_attention(const View& q, const View& k, const View& v, float scale,
                                    const Mask& mask = {}, std::span<const float> sinks = {});

}  // namespace lockstep::fast

// What the decoder-only transformers here have in common beside their sizes.
#pragma once

#include <string>

#include "generate/batch.h"
#include "lockstep/trace.h"
#include "models/binder.h"
#include "models/sizes.h"
#include "nn/rope.h"

namespace lockstep {

/// Weights of one attention block.
struct AttentionWeights {
  nn::Linear q, k, v, o;
};
struct AttentionBias {
  bool qkv = false;
  bool o = false;
};
/// What the layer's q and o are for.
struct AttentionRoles {
  nn::Role q = nn::Role::q;
  nn::Role o = nn::Role::o;
};
AttentionWeights bind_attention(Binder& binder, const std::string& prefix, const TransformerSizes& sizes,
                                AttentionBias bias, AttentionRoles roles = {});

/// The rotary embedding of a config, with the divisors of a Llama 3 GGUF if it stores any.
nn::RoPE bind_rope(Binder& binder, const TransformerSizes& sizes);

/// After the last attention: drops the rows whose logits are not wanted, which nothing reads any more. An
/// observer sees all rows to the end. x: [T, hidden] -> [rows asked for, hidden].
void keep_logits_rows(Tensor& x, const Batch& batch, const Taps& tap);

/// Error unless the key is absent or says "silu".
void require_silu(const Config& config);

}  // namespace lockstep

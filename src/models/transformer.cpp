#include "models/transformer.h"

#include "nn/rows.h"
#include "tensor/fail.h"

namespace lockstep {
AttentionWeights bind_attention(Binder& binder, const std::string& prefix, const TransformerSizes& sizes,
                                AttentionBias bias, AttentionRoles roles) {
  AttentionWeights w;
  w.q = binder.linear(prefix + "q_proj", roles.q, sizes.q_width(), sizes.hidden, bias.qkv);
  w.k = binder.linear(prefix + "k_proj", nn::Role::k, sizes.kv_width(), sizes.hidden, bias.qkv);
  w.v = binder.linear(prefix + "v_proj", nn::Role::v, sizes.kv_width(), sizes.hidden, bias.qkv);
  w.o = binder.linear(prefix + "o_proj", roles.o, sizes.hidden, sizes.q_width(), bias.o);
  return w;
}

nn::RoPE bind_rope(Binder& binder, const TransformerSizes& sizes) {
  nn::RoPE rope(binder.config(), sizes.head_dim, sizes.rope_theta);
  if (binder.has("rope_freqs.weight")) rope.divide(binder.vector("rope_freqs.weight", rope.pairs()));
  return rope;
}

void keep_logits_rows(Tensor& x, const Batch& batch, const Taps& tap) {
  if (!tap.observed()) x = nn::rows(x, batch.logits_rows);
}

void require_silu(const Config& config) {
  const std::string act = config.text("hidden_act", "silu");
  if (act != "silu") {
    fail(ErrorCode::unsupported, "[{}] hidden_act: expected silu, got {}", config.where(), act);
  }
}

}  // namespace lockstep

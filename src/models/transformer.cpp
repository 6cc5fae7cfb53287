#include "models/transformer.h"

#include <cmath>

#include "nn/rows.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

// Sizes come from a file: bounded, so that products of two of them cannot overflow.
int64_t read_size(const Config& config, std::string_view key, std::optional<int64_t> fallback = {}) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t value = config.integer(key, fallback);
  if (value < 1 || value > kMost) {
    fail(ErrorCode::format, "[{}] {}: expected 1 to 2^30, got {}", config.where(), key, value);
  }
  return value;
}

}  // namespace

TransformerSizes read_sizes(const Config& config, const SizeDefaults& defaults) {
  TransformerSizes sizes;
  sizes.layers = read_size(config, "num_hidden_layers");
  sizes.hidden = read_size(config, "hidden_size");
  sizes.heads = read_size(config, "num_attention_heads");
  sizes.kv_heads = read_size(config, "num_key_value_heads", defaults.kv_heads.value_or(sizes.heads));
  sizes.head_dim = read_size(config, "head_dim", std::max<int64_t>(1, sizes.hidden / sizes.heads));
  sizes.intermediate = read_size(config, "intermediate_size");
  sizes.vocab = read_size(config, "vocab_size");
  sizes.eps = static_cast<float>(config.number("rms_norm_eps", defaults.eps));
  if (!(sizes.eps >= 0) || !std::isfinite(sizes.eps)) {
    fail(ErrorCode::format, "[{}] rms_norm_eps: expected 0 or more, got {}", config.where(), sizes.eps);
  }
  if (sizes.heads % sizes.kv_heads != 0) {
    fail(ErrorCode::format, "[{}] num_key_value_heads: expected a divisor of the {} query heads, got {}",
         config.where(), sizes.heads, sizes.kv_heads);
  }
  return sizes;
}

AttentionWeights bind_attention(Binder& binder, const std::string& prefix, const TransformerSizes& sizes,
                                AttentionBias bias, AttentionRoles roles) {
  AttentionWeights w;
  w.q = binder.linear(prefix + "q_proj", roles.q, sizes.q_width(), sizes.hidden, bias.qkv);
  w.k = binder.linear(prefix + "k_proj", nn::Role::k, sizes.kv_width(), sizes.hidden, bias.qkv);
  w.v = binder.linear(prefix + "v_proj", nn::Role::v, sizes.kv_width(), sizes.hidden, bias.qkv);
  w.o = binder.linear(prefix + "o_proj", roles.o, sizes.hidden, sizes.q_width(), bias.o);
  return w;
}

int64_t read_window(const Config& config, int64_t fallback) {
  const int64_t window = config.integer("sliding_window", config.is_null("sliding_window") ? 0 : fallback);
  if (window < 0) {
    fail(ErrorCode::format, "[{}] sliding_window: expected 0 or more, got {}", config.where(), window);
  }
  return window;
}

nn::RoPE bind_rope(Binder& binder, int64_t head_dim, double default_theta) {
  nn::RoPE rope(binder.config(), head_dim, default_theta);
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

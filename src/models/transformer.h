// What the decoder-only transformers here have in common: sizes, read from the config's keys with
// the defaults of transformers' config class, and the attention block's weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "generate/batch.h"
#include "lockstep/trace.h"
#include "models/binder.h"
#include "nn/rope.h"

namespace lockstep {

struct TransformerSizes {
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t heads = 0;     // H
  int64_t kv_heads = 0;  // Hkv
  int64_t head_dim = 0;  // D
  int64_t intermediate = 0;
  int64_t vocab = 0;
  float eps = 0;

  int64_t q_width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
};

/// Defaults that differ between config classes. No value: the number of query heads.
struct SizeDefaults {
  std::optional<int64_t> kv_heads;
  double eps = 1e-6;
};
/// Error if the sizes do not fit together.
TransformerSizes read_sizes(const Config& config, const SizeDefaults& defaults);

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

/// `sliding_window`: keys that a query sees, itself included; 0: all, which null says too.
int64_t read_window(const Config& config, int64_t fallback);

/// The rotary embedding of a config, with the divisors of a Llama 3 GGUF if it stores any.
nn::RoPE bind_rope(Binder& binder, int64_t head_dim, double default_theta);

/// After the last attention: drops the rows whose logits are not wanted, which nothing reads any more. An
/// observer sees all rows to the end. x: [T, hidden] -> [rows asked for, hidden].
void keep_logits_rows(Tensor& x, const Batch& batch, const Taps& tap);

/// Error unless the key is absent or says "silu".
void require_silu(const Config& config);

}  // namespace lockstep

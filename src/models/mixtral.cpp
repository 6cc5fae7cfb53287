// Mixtral: grouped-query attention and a sparse mixture of experts (Jiang et al. 2024;
// transformers' modeling_mixtral.py).
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "models/architecture.h"
#include "models/binder.h"
#include "models/transformer.h"
#include "nn/attention.h"
#include "nn/mlp.h"
#include "nn/norm.h"
#include "nn/rope.h"
#include "nn/rows.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

TransformerSizes mixtral_sizes(const Config& config) {
  TransformerSizes sizes = read_sizes(config, {.kv_heads = 8, .eps = 1e-5, .rope_theta = 1e6});
  std::ranges::fill(sizes.windows, read_window(config, 0));
  sizes.experts = config.integer("num_local_experts", 8);
  sizes.experts_per_token = config.integer("num_experts_per_tok", 2);
  if (sizes.experts < 1 || sizes.experts > 4096 || sizes.experts_per_token < 1 ||
      sizes.experts_per_token > sizes.experts) {
    fail(ErrorCode::format, "[{}] num_experts_per_tok: expected 1 to the {} experts (at most 4096), got {}",
         config.where(), sizes.experts, sizes.experts_per_token);
  }
  return sizes;
}

class Mixtral : public Architecture {
 public:
  Mixtral(Binder& binder, TransformerSizes sizes);

  Tensor forward(const Batch& batch, Taps& tap) const override;

 private:
  struct Layer {
    std::vector<float> attn_norm;  // [hidden]
    AttentionWeights attn;
    std::vector<float> ffn_norm;  // [hidden]
    nn::Linear router;            // [E, hidden]
    nn::SwitchGLU experts;
  };

  void bind_experts(Binder& binder, const std::string& layer, Layer& w) const;
  void layer(int index, Tensor& x, const Batch& batch, const nn::RotaryTable& rotary, Taps& tap) const;

  const nn::Runtime& runtime_;
  TransformerSizes sizes_;
  float scale_;
  nn::RoPE rope_;
  nn::Linear embed_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;  // [hidden]
  nn::Linear head_;
};

Mixtral::Mixtral(Binder& binder, TransformerSizes sizes)
    : runtime_(binder.runtime()),
      sizes_(std::move(sizes)),
      scale_(1.0F / std::sqrt(static_cast<float>(sizes_.head_dim))),
      rope_(bind_rope(binder, sizes_)) {
  const Config& config = binder.config();
  require_silu(config);
  binder.use_experts(sizes_.experts_per_token, sizes_.experts);
  embed_ = binder.embedding("model.embed_tokens", sizes_.vocab, sizes_.hidden);
  for (int64_t i = 0; i < sizes_.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    Layer& w = layers_.emplace_back();
    w.attn_norm = binder.vector(prefix + "input_layernorm.weight", sizes_.hidden);
    w.attn = bind_attention(binder, prefix + "self_attn.", sizes_, {}, {nn::Role::moe_q, nn::Role::moe_o});
    if (i + 1 == sizes_.layers) binder.use_logits_rows();
    w.ffn_norm = binder.vector(prefix + "post_attention_layernorm.weight", sizes_.hidden);
    bind_experts(binder, prefix, w);
    binder.ignore(prefix + "self_attn.rotary_emb.inv_freq");
  }
  final_norm_ = binder.vector("model.norm.weight", sizes_.hidden);
  head_ = binder.head(embed_, config.boolean("tie_word_embeddings", false));
}

// Three layouts: published checkpoints hold w1, w2, w3 of each expert; MLX and GGUF stack gate, down
// and up; transformers 5 in memory stacks gate and up in one tensor.
void Mixtral::bind_experts(Binder& binder, const std::string& layer, Layer& w) const {
  const int64_t hidden = sizes_.hidden;
  const int64_t width = sizes_.intermediate;
  w.experts.runtime = &runtime_;
  const std::string joint = layer + "mlp.experts.";
  if (binder.has(joint + "gate_up_proj")) {
    w.router = binder.linear(layer + "mlp.gate", nn::Role::router, sizes_.experts, hidden);
    w.experts.gate =
        binder.expert_rows(joint + "gate_up_proj", {sizes_.experts, 2 * width, hidden}, 0, width);
    w.experts.up =
        binder.expert_rows(joint + "gate_up_proj", {sizes_.experts, 2 * width, hidden}, width, width);
    w.experts.down = binder.expert_rows(joint + "down_proj", {sizes_.experts, hidden, width}, 0, hidden);
    return;
  }
  const std::string block = layer + "block_sparse_moe.";
  const auto experts = [&](const char* stacked, const char* single, int64_t out, int64_t in) {
    return binder.experts(
        block + "switch_mlp." + stacked,
        [&](int64_t e) { return block + "experts." + std::to_string(e) + "." + single; }, sizes_.experts, out,
        in);
  };
  w.router = binder.linear(block + "gate", nn::Role::router, sizes_.experts, hidden);
  w.experts.gate = experts("gate_proj", "w1", width, hidden);
  w.experts.up = experts("up_proj", "w3", width, hidden);
  w.experts.down = experts("down_proj", "w2", hidden, width);
}

// One layer. x: [T, hidden], the residual stream, updated in place; after the last layer [rows asked for,
// hidden], unless somebody observes.
void Mixtral::layer(int index, Tensor& x, const Batch& batch, const nn::RotaryTable& rotary,
                    Taps& tap) const {
  const Layer& w = layers_[index];
  Tensor h = tap(index, Site::attn_norm, nn::rms_norm(x, w.attn_norm, sizes_.eps, runtime_));
  auto [q, k, v] = nn::qkv(h, w.attn.q, w.attn.k, w.attn.v, sizes_.head_dim);
  tap(index, Site::q_proj, q);  // [T, H, D]
  tap(index, Site::k_proj, k);  // [T, Hkv, D]
  tap(index, Site::v_proj, v);  // [T, Hkv, D]
  nn::rotate(q, rotary, runtime_);
  nn::rotate(k, rotary, runtime_);
  tap(index, Site::q_rope, q);
  tap(index, Site::k_rope, k);
  nn::append(batch.cache(index), k, v, runtime_, tap);
  Tensor ctx = tap(index, Site::attn_ctx, nn::attention(q, batch.cache(index), scale_, runtime_, tap));
  nn::add(x, tap(index, Site::o_proj, nn::linear(ctx, w.attn.o)), runtime_);
  tap(index, Site::attn_resid, x);
  if (index + 1 == sizes_.layers) keep_logits_rows(x, batch, tap);
  h = tap(index, Site::ffn_norm, nn::rms_norm(x, w.ffn_norm, sizes_.eps, runtime_));
  nn::add(x, nn::sparse_moe(h, w.router, w.experts, sizes_.experts_per_token, index, tap), runtime_);
  tap(index, Site::ffn_resid, x);
}

Tensor Mixtral::forward(const Batch& batch, Taps& tap) const {
  const nn::RotaryTable rotary = rope_.table(batch, runtime_);
  Tensor x = tap(kNoLayer, Site::embed, nn::embedding(batch.ids, embed_));
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) layer(i, x, batch, rotary, tap);
  if (tap.observed()) x = nn::rows(x, batch.logits_rows);
  Tensor last = nn::rms_norm(x, final_norm_, sizes_.eps, runtime_);
  tap(kNoLayer, Site::final_norm, last);
  return tap(kNoLayer, Site::logits, nn::linear(last, head_));
}

const ArchitectureEntry kEntry("mixtral", mixtral_sizes,
                               [](Binder& binder, TransformerSizes sizes) -> std::unique_ptr<Architecture> {
                                 return std::make_unique<Mixtral>(binder, std::move(sizes));
                               });

}  // namespace
}  // namespace lockstep

// Qwen2 and Qwen2.5: biases on queries, keys and values (Yang et al. 2024; transformers'
// modeling_qwen2.py).
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

TransformerSizes qwen2_sizes(const Config& config) {
  TransformerSizes sizes = read_sizes(config, {.kv_heads = 32});
  // Layers from max_window_layers on have a window, or those that layer_types names.
  const int64_t window = read_window(config, 4096);
  const int64_t first = config.integer("max_window_layers", 28);
  const std::vector<std::string> types = config.texts("layer_types");
  if (!config.boolean("use_sliding_window", false)) return sizes;
  if (!types.empty() && static_cast<int64_t>(types.size()) != sizes.layers) {
    fail(ErrorCode::format, "[{}] layer_types: expected {} entries, got {}", config.where(), sizes.layers,
         types.size());
  }
  for (int64_t i = 0; i < sizes.layers; ++i) {
    const bool slides = types.empty() ? i >= first : types[i] == "sliding_attention";
    if (slides) sizes.windows[i] = window;
  }
  return sizes;
}

class Qwen2 : public Architecture {
 public:
  Qwen2(Binder& binder, TransformerSizes sizes);

  Tensor forward(const Batch& batch, Taps& tap) const override;

 private:
  struct Layer {
    std::vector<float> attn_norm;  // [hidden]
    AttentionWeights attn;
    std::vector<float> ffn_norm;  // [hidden]
    nn::Linear gate, up, down;
  };

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

Qwen2::Qwen2(Binder& binder, TransformerSizes sizes)
    : runtime_(binder.runtime()),
      sizes_(std::move(sizes)),
      scale_(1.0F / std::sqrt(static_cast<float>(sizes_.head_dim))),
      rope_(bind_rope(binder, sizes_)) {
  const Config& config = binder.config();
  require_silu(config);
  embed_ = binder.embedding("model.embed_tokens", sizes_.vocab, sizes_.hidden);
  for (int64_t i = 0; i < sizes_.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    Layer& w = layers_.emplace_back();
    w.attn_norm = binder.vector(prefix + "input_layernorm.weight", sizes_.hidden);
    w.attn = bind_attention(binder, prefix + "self_attn.", sizes_, {.qkv = true, .o = false});
    if (i + 1 == sizes_.layers) binder.use_logits_rows();
    w.ffn_norm = binder.vector(prefix + "post_attention_layernorm.weight", sizes_.hidden);
    w.gate = binder.linear(prefix + "mlp.gate_proj", nn::Role::gate, sizes_.intermediate, sizes_.hidden);
    w.up = binder.linear(prefix + "mlp.up_proj", nn::Role::up, sizes_.intermediate, sizes_.hidden);
    w.down = binder.linear(prefix + "mlp.down_proj", nn::Role::down, sizes_.hidden, sizes_.intermediate);
    binder.ignore(prefix + "self_attn.rotary_emb.inv_freq");
  }
  final_norm_ = binder.vector("model.norm.weight", sizes_.hidden);
  head_ = binder.head(embed_, config.boolean("tie_word_embeddings", false));
}

// One layer. x: [T, hidden], the residual stream, updated in place; after the last layer [rows asked for,
// hidden], unless somebody observes.
void Qwen2::layer(int index, Tensor& x, const Batch& batch, const nn::RotaryTable& rotary, Taps& tap) const {
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
  nn::add(x, nn::mlp(h, w.gate, w.up, w.down, index, tap), runtime_);
  tap(index, Site::ffn_resid, x);
}

Tensor Qwen2::forward(const Batch& batch, Taps& tap) const {
  const nn::RotaryTable rotary = rope_.table(batch, runtime_);
  Tensor x = tap(kNoLayer, Site::embed, nn::embedding(batch.ids, embed_));
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) layer(i, x, batch, rotary, tap);
  if (tap.observed()) x = nn::rows(x, batch.logits_rows);
  Tensor last = nn::rms_norm(x, final_norm_, sizes_.eps, runtime_);
  tap(kNoLayer, Site::final_norm, last);
  return tap(kNoLayer, Site::logits, nn::linear(last, head_));
}

const ArchitectureEntry kEntry("qwen2", qwen2_sizes,
                               [](Binder& binder, TransformerSizes sizes) -> std::unique_ptr<Architecture> {
                                 return std::make_unique<Qwen2>(binder, std::move(sizes));
                               });

}  // namespace
}  // namespace lockstep

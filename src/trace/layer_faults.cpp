// Faults of attention, norms, activations and experts.
#include <algorithm>
#include <cmath>
#include <random>

#include "quant/blocks.h"
#include "quant/half.h"
#include "tensor/fail.h"
#include "trace/fault_tools.h"

namespace lockstep {
namespace {

using nlohmann::json;

std::vector<float> vector_of(const ModelFacts& facts, const std::string& name) {
  const StoredTensor* tensor = facts.checkpoint->find(name);
  std::vector<float> values(static_cast<size_t>(tensor->shape.size()));
  quant::dequantise_row(*tensor, 0, values.data());
  return values;
}

bool has_bias(const ModelFacts& facts) {
  return facts.checkpoint->find("model.layers.0.self_attn.q_proj.bias") != nullptr;
}

// Where query head h goes so that, with groups of neighbours, it meets KV head h % Hkv.
std::vector<int64_t> tiled(const ModelFacts& facts) {
  const int64_t group = facts.heads / facts.kv_heads;
  std::vector<int64_t> place(static_cast<size_t>(facts.heads));
  for (int64_t h = 0; h < facts.heads; ++h)
    place[static_cast<size_t>(h)] = h % facts.kv_heads * group + h / facts.kv_heads;
  return place;
}
void permute_heads(Tensor& x, const std::vector<int64_t>& to, bool back) {
  const Tensor old = x.clone();
  const int64_t width = x.shape()[2];
  for (int64_t t = 0; t < x.shape()[0]; ++t) {
    for (size_t h = 0; h < to.size(); ++h) {
      const int64_t from = back ? to[h] : static_cast<int64_t>(h);
      const int64_t target = back ? static_cast<int64_t>(h) : to[h];
      std::copy_n(old.row(t) + from * width, width, x.row(t) + target * width);
    }
  }
}

// A window that is `by` longer acts where the text is longer than both.
Why needs_window(const ModelFacts& facts, const Sequences& sequences, int64_t by) {
  if (facts.window == 0) return "the model has no window";
  return longest(sequences) > facts.window + by ? Why() : Why("the text is no longer than the window");
}

}  // namespace

std::vector<Injection> attention_faults() {
  std::vector<Injection> all;
  all.push_back(
      {.fault = fault("gqa-tiled", 6, "gives query head h the KV head h % Hkv", "scores", "some"),
       .cannot =
           [](const ModelFacts& f, const Sequences&) {
             return f.kv_heads == 1 || f.kv_heads == f.heads ? Why("every head has the same choice") : Why();
           },
       .before =  // Query heads change places while they meet the keys; what is seen of them stays in order.
       [](const ModelFacts& f, const PassRows&, int, Site site, Tensor& x, Seen&) {
         if (site == Site::scores || site == Site::probs || site == Site::attn_ctx)
           permute_heads(x, tiled(f), true);
       },
       .after =
           [](const ModelFacts& f, const PassRows&, int, Site site, Tensor& x, Seen&) {
             if (site == Site::q_rope || site == Site::scores || site == Site::probs)
               permute_heads(x, tiled(f), false);
           }});
  for (const int by : {-1, 1}) {
    all.push_back({.fault = fault(by < 0 ? "window-one-short" : "window-one-long", 7,
                                  by < 0 ? "sees a key too few" : "sees a key too many", "scores", "all"),
                   .cannot = [=](const ModelFacts& f,
                                 const Sequences& s) { return needs_window(f, s, std::min(by, 0)); },
                   .patch =
                       [=](const ModelFacts& f) {
                         return f.window > 0 ? json{{"sliding_window", f.window + by}} : json::object();
                       }});
  }
  all.push_back({.fault = fault("window-missing", 8, "sees all keys", "scores", "all"),
                 .cannot = [](const ModelFacts& f, const Sequences& s) { return needs_window(f, s, 0); },
                 .patch =
                     [](const ModelFacts& f) {
                       return f.window > 0 ? json{{"sliding_window", 1 << 20}} : json::object();
                     }});
  all.push_back({.fault = fault("kv-lost-in-decode", 21, "does not keep the keys of decode steps", "k_cache",
                                "all", true),
                 .cannot = needs_decode,
                 .before =
                     [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
                       if ((site == Site::k_cache || site == Site::v_cache) && rows.step > 0) scale(x, 0);
                     },
                 .inner = Site::k_cache});
  all.push_back({.fault = fault("rows-share-keys", 24, "gives every sequence the keys of the first",
                                "k_cache", "all", true, 1),
                 .cannot = needs_rows,
                 .before =
                     [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
                       if ((site != Site::k_cache && site != Site::v_cache) || rows.step == 0) return;
                       for (int64_t t = 1; t < x.shape()[0]; ++t)
                         std::copy_n(x.row(0), x.row_size(), x.row(t));
                     },
                 .inner = Site::k_cache});
  all.push_back({.fault = fault("scores-in-f16", 19, "scales Q K^T after the product, in f16", "scores"),
                 .cannot = always,
                 .before = at(Site::scores,
                              [](const ModelFacts& f, const PassRows&, int, Tensor& x, Seen&) {
                                const float root = std::sqrt(static_cast<float>(f.head_dim));
                                for (float& score : x.values())
                                  score = f16_value(to_f16(score * root)) / root;
                              }),
                 .inner = Site::scores});
  all.push_back(
      {.fault = fault("race", 25, "adds a number that differs between runs to one value", "attn_ctx"),
       .cannot = always,
       .before = at(Site::attn_ctx, [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
         std::random_device chance;
         x.row(0)[chance() % static_cast<uint64_t>(x.row_size())] +=
             1 + static_cast<float>(chance()) * 0x1p-32F;
       })});
  return all;
}

std::vector<Injection> layer_faults() {
  std::vector<Injection> all;
  all.push_back(
      {.fault = fault("norm-plus-one", 9, "multiplies by 1 + weight", "attn_norm"),
       .cannot = always,
       .before = at(Site::attn_norm, [](const ModelFacts& f, const PassRows&, int layer, Tensor& x, Seen&) {
         const auto weight =
             vector_of(f, "model.layers." + std::to_string(layer) + ".input_layernorm.weight");
         for (int64_t t = 0; t < x.shape()[0]; ++t) {
           for (int64_t d = 0; d < x.row_size(); ++d) {
             const float w = weight[static_cast<size_t>(d)];
             if (w != 0) x.row(t)[d] *= (1 + w) / w;
           }
         }
       })});
  all.push_back({.fault = fault("norm-eps", 10, "a thousand times the epsilon", "attn_norm"),
                 .cannot = always,
                 .patch = [](const ModelFacts& f) {
                   return json{{"rms_norm_eps", 1000 * f.config.value("rms_norm_eps", 1e-5)}};
                 }});
  all.push_back(
      {.fault = fault("gelu", 11, "GELU in place of SiLU", "act"),
       .cannot = [](const ModelFacts& f,
                    const Sequences&) { return f.experts > 0 ? Why("experts keep theirs inside") : Why(); },
       .before = at(Site::act,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen& seen) {
                      const auto gate = seen.at(Site::gate).values();
                      const auto up = seen.at(Site::up).values();
                      for (size_t i = 0; i < gate.size(); ++i)
                        x.data()[i] = 0.5F * gate[i] * (1 + std::erf(gate[i] * 0.70710678F)) * up[i];
                    }),
       .keeps = {Site::gate, Site::up}});
  all.push_back({.fault = fault("embedding-scale", 12, "multiplies the embedding by sqrt(hidden)", "embed"),
                 .cannot = always,
                 .before = at(Site::embed, [](const ModelFacts& f, const PassRows&, int, Tensor& x, Seen&) {
                   scale(x, std::sqrt(static_cast<float>(f.hidden)));
                 })});
  all.push_back({.fault = fault("logit-softcap", 12, "caps the logits at 5", "logits"),
                 .cannot = always,
                 .before = at(Site::logits, [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
                   for (float& v : x.values()) v = 5 * std::tanh(v / 5);
                 })});
  all.push_back(
      {.fault = fault("bias-dropped", 14, "leaves out the biases of Q", "q_proj", "all"),
       .cannot = [](const ModelFacts& f,
                    const Sequences&) { return has_bias(f) ? Why() : Why("the model has no biases"); },
       .before = at(Site::q_proj, [](const ModelFacts& f, const PassRows&, int layer, Tensor& x, Seen&) {
         if (!has_bias(f)) return;
         const auto bias = vector_of(f, "model.layers." + std::to_string(layer) + ".self_attn.q_proj.bias");
         for (int64_t t = 0; t < x.shape()[0]; ++t)
           for (size_t d = 0; d < bias.size(); ++d) x.row(t)[d] -= bias[d];
       })});
  all.push_back(
      {.fault = fault("router-not-renormalised", 15,
                      "keeps the probabilities of the chosen experts as they are", "router_weights"),
       .cannot = needs_experts,
       .before = at(Site::router_weights,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen& seen) {
                      const Tensor& logits = seen.at(Site::router_logits);
                      for (int64_t t = 0; t < x.shape()[0]; ++t) {
                        double total = 0;
                        for (int64_t e = 0; e < x.row_size(); ++e) total += std::exp(logits.row(t)[e]);
                        for (int64_t e = 0; e < x.row_size(); ++e)
                          if (x.row(t)[e] != 0)
                            x.row(t)[e] = static_cast<float>(std::exp(logits.row(t)[e]) / total);
                      }
                    }),
       .keeps = {Site::router_logits}});
  all.push_back(
      {.fault = fault("router-top-1", 15, "sends each token to its best expert alone", "router_weights"),
       .cannot = needs_experts,
       .before = at(Site::router_weights, [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
         for (int64_t t = 0; t < x.shape()[0]; ++t) {
           float* best = std::max_element(x.row(t), x.row(t) + x.row_size());
           std::fill_n(x.row(t), x.row_size(), 0.0F);
           *best = 1;
         }
       })});
  all.push_back(
      {.fault = fault("experts-swapped", 16, "hands the rows of an expert to the next one", "expert_gate"),
       .cannot = needs_experts,
       .after = at(Site::router_weights, [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
         for (int64_t t = 0; t < x.shape()[0]; ++t)
           std::rotate(x.row(t), x.row(t) + 1, x.row(t) + x.row_size());
       })});
  return all;
}

}  // namespace lockstep

// The catalogue of faults. Numbers are those of docs/faults.md; each says where its error must be found.
#include <algorithm>
#include <charconv>
#include <cmath>

#include "quant/blocks.h"
#include "tensor/fail.h"
#include "trace/inject.h"

namespace lockstep {
namespace {

using nlohmann::json;
using Seen = std::map<Site, Tensor>;
using Sequences = std::vector<Trace::Sequence>;
using Why = std::optional<std::string>;

// x: [T, H, D], rotated in place at `position(t)`; the first `dims` of D, pairs (i, i + dims / 2) or
// neighbours.
template <typename Position>
void rotate(Tensor& x, int64_t dims, bool neighbours, double theta, Position position) {
  const int64_t heads = x.shape()[1], width = x.shape()[2], half = dims / 2;
  for (int64_t t = 0; t < x.shape()[0]; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      float* row = x.row(t) + h * width;
      for (int64_t i = 0; i < half; ++i) {
        const double angle =
            position(t) * std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dims));
        float& a = row[neighbours ? 2 * i : i];
        float& b = row[neighbours ? 2 * i + 1 : i + half];
        const double first = a, second = b;
        a = static_cast<float>(first * std::cos(angle) - second * std::sin(angle));
        b = static_cast<float>(second * std::cos(angle) + first * std::sin(angle));
      }
    }
  }
}

bool is_rope(Site site) { return site == Site::q_rope || site == Site::k_rope; }
Site unrotated(Site site) { return site == Site::q_rope ? Site::q_proj : Site::k_proj; }

// Q and K rotated anew from what they were before.
template <typename Rotate>
Injection::Hook rotated_anew(Rotate rotate_again) {
  return [=](const ModelFacts& facts, const PassRows& rows, int, Site site, Tensor& x, Seen& seen) {
    if (!is_rope(site)) return;
    x = seen.at(unrotated(site)).clone();
    rotate_again(facts, rows, x);
  };
}
const std::vector<Site> kBeforeRope = {Site::q_proj, Site::k_proj};

Why default_rope(const ModelFacts& facts, const Sequences&) {
  return facts.rope_type == "default" ? Why() : Why("the model's frequencies are scaled");
}
Why scaled(const std::string& type, const ModelFacts& facts) {
  return facts.rope_type == type ? Why() : Why("the model has no " + type + " scaling");
}
int64_t longest(const Sequences& sequences) {
  size_t most = 0;
  for (const auto& each : sequences) most = std::max(most, each.ids.size() + each.fed.size());
  return static_cast<int64_t>(most);
}
bool has_decode(const Sequences& sequences) {
  return std::ranges::any_of(sequences, [](const auto& each) { return !each.fed.empty(); });
}
Why needs_decode(const ModelFacts&, const Sequences& sequences) {
  return has_decode(sequences) ? Why() : Why("there are no decode steps");
}
Why needs_rows(const ModelFacts&, const Sequences& sequences) {
  return sequences.size() > 1 && has_decode(sequences) ? Why() : Why("there is one sequence");
}
Why needs_window(const ModelFacts& facts, const Sequences& sequences) {
  if (facts.window == 0) return "the model has no window";
  return longest(sequences) > facts.window ? Why() : Why("the text is no longer than the window");
}
Why needs_experts(const ModelFacts& facts, const Sequences&) {
  return facts.experts > 0 ? Why() : Why("the model has no experts");
}
Why always(const ModelFacts&, const Sequences&) { return {}; }

Why longer_than_a_chunk(const ModelFacts&, const Sequences& sequences) {
  return longest(sequences) > 8 ? Why() : Why("the text is no longer than a chunk");
}

// Q and K rotated at other positions than their own.
template <typename Cannot, typename Position>
Injection misplaced(Fault fault, Cannot cannot, Position position) {
  const auto rotate_there = [=](const ModelFacts& facts, const PassRows& rows, Tensor& x) {
    rotate(x, facts.head_dim, false, facts.theta,
           [&](int64_t t) { return position(rows, static_cast<size_t>(t)); });
  };
  return {std::move(fault),
          [=](const ModelFacts& facts, const Sequences& sequences) {
            const Why why = cannot(facts, sequences);
            return why ? why : default_rope(facts, sequences);
          },
          {},
          rotated_anew(rotate_there),
          {},
          kBeforeRope};
}

json without_rope_scaling(const ModelFacts& facts) {
  return {{"rope_scaling", nullptr},
          {"rope_parameters",
           {{"rope_type", "default"},
            {"rope_theta", facts.theta},
            {"factor", nullptr},
            {"low_freq_factor", nullptr},
            {"high_freq_factor", nullptr},
            {"attention_factor", nullptr},
            {"beta_fast", nullptr},
            {"beta_slow", nullptr},
            {"original_max_position_embeddings", nullptr}}}};
}

// YaRN's factor of Q and K, 0.1 ln(factor) + 1 unless given (Peng et al. 2023).
double yarn_factor(const ModelFacts& facts) {
  const json& rope = facts.config.contains("rope_parameters") ? facts.config["rope_parameters"]
                                                              : facts.config["rope_scaling"];
  if (rope.contains("attention_factor") && rope["attention_factor"].is_number())
    return rope["attention_factor"];
  return 0.1 * std::log(rope["factor"].get<double>()) + 1;
}
json with_yarn_factor(const ModelFacts& facts, double factor) {
  const char* key = facts.config.contains("rope_parameters") && !facts.config["rope_parameters"].is_null()
                        ? "rope_parameters"
                        : "rope_scaling";
  return {{key, {{"attention_factor", factor}}}};
}

std::vector<float> vector_of(const ModelFacts& facts, const std::string& name) {
  const StoredTensor* tensor = facts.checkpoint->find(name);
  std::vector<float> values(static_cast<size_t>(tensor->shape.size()));
  quant::dequantise_row(*tensor, 0, values.data());
  return values;
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

// Rows of a projection, [T, rows], in the order that un-permuting for `heads` heads would leave them.
void unpermute_columns(Tensor& x, int64_t heads) {
  const Tensor old = x.clone();
  const int64_t rows = x.row_size(), part = rows / heads;
  for (int64_t t = 0; t < x.shape()[0]; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t within = r % part;
      x.row(t)[r] = old.row(t)[r - within + 2 * (within % (part / 2)) + within / (part / 2)];
    }
  }
}

void scale(Tensor& x, float factor) {
  for (float& value : x.values()) value *= factor;
}

// A hook for one site, every layer.
template <typename Change>
Injection::Hook at(Site where, Change change) {
  return [=](const ModelFacts& facts, const PassRows& rows, int layer, Site site, Tensor& x, Seen& seen) {
    if (site == where) change(facts, rows, layer, x, seen);
  };
}

Fault fault(std::string name, int kind, std::string summary, std::string site, std::string heads = "",
            bool decode = false, int row = 0) {
  return {std::move(name), kind, std::move(summary), std::move(site), decode, std::move(heads), row};
}

std::vector<Injection> rope_faults() {
  std::vector<Injection> all;
  all.push_back({fault("rope-interleaved", 1, "rotates neighbours where halves are paired", "q_rope", "all"),
                 default_rope,
                 {},
                 rotated_anew([](const ModelFacts& f, const PassRows& rows, Tensor& x) {
                   rotate(x, f.head_dim, true, f.theta,
                          [&](int64_t t) { return rows.positions[static_cast<size_t>(t)]; });
                 }),
                 {},
                 kBeforeRope});
  all.push_back(
      {fault("qk-not-unpermuted", 1, "leaves Q and K in the row order of GGUF files", "q_proj", "all"),
       always,
       {},
       [](const ModelFacts& f, const PassRows&, int, Site site, Tensor& x, Seen&) {
         if (site == Site::q_proj) unpermute_columns(x, f.heads);
         if (site == Site::k_proj) unpermute_columns(x, f.kv_heads);
       },
       {},
       {}});
  all.push_back({fault("k-unpermuted-by-query-heads", 2, "un-permutes K with the number of query heads",
                       "k_proj", "all"),
                 [](const ModelFacts& f, const Sequences&) {
                   return f.heads == f.kv_heads || f.kv_heads * f.head_dim % (2 * f.heads) != 0
                              ? Why("heads do not divide so")
                              : Why();
                 },
                 {},
                 at(Site::k_proj, [](const ModelFacts& f, const PassRows&, int, Tensor& x,
                                     Seen&) { unpermute_columns(x, f.heads); }),
                 {},
                 {}});
  for (const char* type : {"linear", "llama3", "yarn"}) {
    all.push_back({fault(std::string("rope-") + type + "-ignored", 3,
                         std::string("leaves out the ") + type + " scaling", "q_rope", "all"),
                   [=](const ModelFacts& f, const Sequences&) { return scaled(type, f); },
                   without_rope_scaling,
                   {},
                   {},
                   {}});
  }
  all.push_back({fault("rope-half-the-dims", 3, "rotates only half of each head", "q_rope", "all"),
                 default_rope,
                 {},
                 rotated_anew([](const ModelFacts& f, const PassRows& rows, Tensor& x) {
                   rotate(x, f.head_dim / 4 * 2, false, f.theta,
                          [&](int64_t t) { return rows.positions[static_cast<size_t>(t)]; });
                 }),
                 {},
                 kBeforeRope});
  all.push_back({fault("rope-theta", 3, "ten times the base", "q_rope", "all"),
                 default_rope,
                 [](const ModelFacts& f) {
                   return json{{"rope_theta", nullptr},
                               {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", f.theta * 10}}}};
                 },
                 {},
                 {},
                 {}});
  all.push_back({fault("yarn-mscale-missing", 4, "leaves out YaRN's factor of Q and K", "q_rope", "all"),
                 [](const ModelFacts& f, const Sequences&) { return scaled("yarn", f); },
                 [](const ModelFacts& f) { return with_yarn_factor(f, 1.0); },
                 {},
                 {},
                 {}});
  all.push_back({fault("yarn-mscale-twice", 4, "applies YaRN's factor twice", "q_rope", "all"),
                 [](const ModelFacts& f, const Sequences&) { return scaled("yarn", f); },
                 [](const ModelFacts& f) { return with_yarn_factor(f, yarn_factor(f) * yarn_factor(f)); },
                 {},
                 {},
                 {}});
  all.push_back(
      {fault("rope-flatten-heads", 5, "with L = 1 rotates head 0 and loses the others", "q_rope", "1-", true),
       needs_decode,
       {},
       [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
         if (!is_rope(site) || rows.step == 0) return;
         for (int64_t t = 0; t < x.shape()[0]; ++t)
           std::fill(x.row(t) + x.shape()[2], x.row(t) + x.row_size(), 0.0F);
       },
       {},
       {}});
  all.push_back(misplaced(
      fault("rope-offset-of-row-0", 5, "with L = 1 rotates every row of the batch at the position of row 0",
            "q_rope", "all", true, 1),
      needs_rows, [](const PassRows& rows, size_t t) { return rows.positions[rows.step == 0 ? t : 0]; }));
  all.push_back(misplaced(
      fault("decode-position", 20, "counts one position too many after the prefill", "q_rope", "all", true),
      needs_decode,
      [](const PassRows& rows, size_t t) { return rows.positions[t] + (rows.step > 0 ? 1 : 0); }));
  all.push_back(misplaced(
      fault("chunk-position", 22, "starts positions anew with every chunk of 8", "q_rope", "all"),
      longer_than_a_chunk,
      [](const PassRows& rows, size_t t) { return rows.positions[t] % (rows.step == 0 ? 8 : 1 << 30); }));
  all.push_back(
      misplaced(fault("left-pad-positions", 23,
                      "counts three tokens of padding as positions after the prefill", "q_rope", "all", true),
                needs_decode,
                [](const PassRows& rows, size_t t) { return rows.positions[t] + (rows.step > 0 ? 3 : 0); }));
  return all;
}

std::vector<Injection> attention_faults() {
  std::vector<Injection> all;
  all.push_back({fault("gqa-tiled", 6, "gives query head h the KV head h % Hkv", "attn_ctx", "some"),
                 [](const ModelFacts& f, const Sequences&) {
                   return f.kv_heads == 1 || f.kv_heads == f.heads ? Why("every head has the same choice")
                                                                   : Why();
                 },
                 {},
                 at(Site::attn_ctx, [](const ModelFacts& f, const PassRows&, int, Tensor& x,
                                       Seen&) { permute_heads(x, tiled(f), true); }),
                 at(Site::q_rope, [](const ModelFacts& f, const PassRows&, int, Tensor& x,
                                     Seen&) { permute_heads(x, tiled(f), false); }),
                 {}});
  for (const int by : {-1, 1}) {
    all.push_back({fault(by < 0 ? "window-one-short" : "window-one-long", 7,
                         by < 0 ? "sees a key too few" : "sees a key too many", "attn_ctx", "all"),
                   needs_window,
                   [=](const ModelFacts& f) { return json{{"sliding_window", f.window + by}}; },
                   {},
                   {},
                   {}});
  }
  all.push_back({fault("window-missing", 8, "sees all keys", "attn_ctx", "all"),
                 needs_window,
                 [](const ModelFacts&) { return json{{"sliding_window", 1 << 20}}; },
                 {},
                 {},
                 {}});
  all.push_back(
      {fault("kv-lost-in-decode", 21, "does not keep the keys of decode steps", "attn_ctx", "all", true),
       needs_decode,
       {},
       {},
       [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
         if ((site == Site::k_rope || site == Site::v_proj) && rows.step > 0) scale(x, 0);
       },
       {}});
  all.push_back(
      {fault("rows-share-keys", 24, "gives every sequence the keys of the first", "attn_ctx", "all", true, 1),
       needs_rows,
       {},
       {},
       [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
         if ((site != Site::k_rope && site != Site::v_proj) || rows.step == 0) return;
         for (int64_t t = 1; t < x.shape()[0]; ++t) std::copy_n(x.row(0), x.row_size(), x.row(t));
       },
       {}});
  return all;
}

std::vector<Injection> layer_faults() {
  std::vector<Injection> all;
  all.push_back({fault("norm-plus-one", 9, "multiplies by 1 + weight", "attn_norm"),
                 always,
                 {},
                 at(Site::attn_norm,
                    [](const ModelFacts& f, const PassRows&, int layer, Tensor& x, Seen&) {
                      const auto weight =
                          vector_of(f, "model.layers." + std::to_string(layer) + ".input_layernorm.weight");
                      for (int64_t t = 0; t < x.shape()[0]; ++t) {
                        for (int64_t d = 0; d < x.row_size(); ++d) {
                          const float w = weight[static_cast<size_t>(d)];
                          if (w != 0) x.row(t)[d] *= (1 + w) / w;
                        }
                      }
                    }),
                 {},
                 {}});
  all.push_back({fault("norm-eps", 10, "a thousand times the epsilon", "attn_norm"),
                 always,
                 [](const ModelFacts& f) {
                   return json{{"rms_norm_eps", 1000 * f.config.value("rms_norm_eps", 1e-5)}};
                 },
                 {},
                 {},
                 {}});
  all.push_back({fault("gelu", 11, "GELU in place of SiLU", "act"),
                 [](const ModelFacts& f, const Sequences&) {
                   return f.experts > 0 ? Why("experts keep theirs inside") : Why();
                 },
                 {},
                 at(Site::act,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen& seen) {
                      const auto gate = seen.at(Site::gate).values();
                      const auto up = seen.at(Site::up).values();
                      for (size_t i = 0; i < gate.size(); ++i)
                        x.data()[i] = 0.5F * gate[i] * (1 + std::erf(gate[i] * 0.70710678F)) * up[i];
                    }),
                 {},
                 {Site::gate, Site::up}});
  all.push_back({fault("embedding-scale", 12, "multiplies the embedding by sqrt(hidden)", "embed"),
                 always,
                 {},
                 at(Site::embed, [](const ModelFacts& f, const PassRows&, int, Tensor& x,
                                    Seen&) { scale(x, std::sqrt(static_cast<float>(f.hidden))); }),
                 {},
                 {}});
  all.push_back({fault("logit-softcap", 12, "caps the logits at 5", "logits"),
                 always,
                 {},
                 at(Site::logits,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
                      for (float& v : x.values()) v = 5 * std::tanh(v / 5);
                    }),
                 {},
                 {}});
  all.push_back({fault("bias-dropped", 14, "leaves out the biases of Q", "q_proj", "all"),
                 [](const ModelFacts& f, const Sequences&) {
                   return f.checkpoint->find("model.layers.0.self_attn.q_proj.bias") == nullptr
                              ? Why("the model has no biases")
                              : Why();
                 },
                 {},
                 at(Site::q_proj,
                    [](const ModelFacts& f, const PassRows&, int layer, Tensor& x, Seen&) {
                      const auto bias =
                          vector_of(f, "model.layers." + std::to_string(layer) + ".self_attn.q_proj.bias");
                      for (int64_t t = 0; t < x.shape()[0]; ++t)
                        for (size_t d = 0; d < bias.size(); ++d) x.row(t)[d] -= bias[d];
                    }),
                 {},
                 {}});
  all.push_back({fault("router-not-renormalised", 15,
                       "keeps the probabilities of the chosen experts as they are", "router_weights"),
                 needs_experts,
                 {},
                 at(Site::router_weights,
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
                 {},
                 {Site::router_logits}});
  all.push_back({fault("router-top-1", 15, "sends each token to its best expert alone", "router_weights"),
                 needs_experts,
                 {},
                 at(Site::router_weights,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
                      for (int64_t t = 0; t < x.shape()[0]; ++t) {
                        float* best = std::max_element(x.row(t), x.row(t) + x.row_size());
                        std::fill_n(x.row(t), x.row_size(), 0.0F);
                        *best = 1;
                      }
                    }),
                 {},
                 {}});
  all.push_back({fault("experts-swapped", 16, "hands the rows of an expert to the next one", "moe_out"),
                 needs_experts,
                 {},
                 {},
                 at(Site::router_weights,
                    [](const ModelFacts&, const PassRows&, int, Tensor& x, Seen&) {
                      for (int64_t t = 0; t < x.shape()[0]; ++t)
                        std::rotate(x.row(t), x.row(t) + 1, x.row(t) + x.row_size());
                    }),
                 {}});
  return all;
}

}  // namespace

ModelFacts::ModelFacts(const Checkpoint& from)
    : checkpoint(&from), config(json::parse(from.config().json())) {
  const Config& c = from.config();
  heads = c.integer("num_attention_heads");
  kv_heads = c.integer("num_key_value_heads", heads);
  hidden = c.integer("hidden_size");
  head_dim = c.integer("head_dim", hidden / std::max<int64_t>(heads, 1));
  // Qwen2 says apart whether its window is used.
  window = c.boolean("use_sliding_window", true) ? c.integer("sliding_window", 0) : 0;
  experts = c.integer("num_local_experts", 0);
  chosen = c.integer("num_experts_per_tok", 2);
  const Config* rope =
      c.object("rope_parameters") != nullptr ? c.object("rope_parameters") : c.object("rope_scaling");
  theta = c.number("rope_theta", rope != nullptr ? rope->number("rope_theta", 10000.0) : 10000.0);
  if (rope != nullptr) rope_type = rope->text("rope_type", rope->text("type", "default"));
}

const std::vector<Injection>& injections() {
  static const std::vector<Injection> all = [] {
    std::vector<Injection> list = rope_faults();
    for (auto make : {attention_faults, layer_faults}) {
      for (Injection& each : make()) list.push_back(std::move(each));
    }
    return list;
  }();
  return all;
}

namespace {

// The hook, in one layer only.
Injection::Hook only_in(int wanted, Injection::Hook hook) {
  if (!hook) return {};
  return [=](const ModelFacts& facts, const PassRows& rows, int layer, Site site, Tensor& x, Seen& seen) {
    if (layer == wanted) hook(facts, rows, layer, site, x, seen);
  };
}

}  // namespace

Injection find_injection(const std::string& text) {
  const size_t at = text.find('@');
  const std::string name = text.substr(0, at);
  std::string names;
  for (const Injection& each : injections()) {
    names += (names.empty() ? "" : ", ") + each.fault.name;
    if (each.fault.name != name) continue;
    if (at == std::string::npos) return each;
    constexpr std::string_view kLayer = "layer=";
    const std::string place = text.substr(at + 1);
    int layer = 0;
    const char* end = place.data() + place.size();
    if (!place.starts_with(kLayer) || each.patch ||
        std::from_chars(place.data() + kLayer.size(), end, layer).ptr != end ||
        place.size() == kLayer.size()) {
      fail(ErrorCode::invalid_argument,
           "[inject] place: expected NAME@layer=N, of a fault that is no change of the config; got {}", text);
    }
    Injection narrowed = each;
    narrowed.before = only_in(layer, each.before);
    narrowed.after = only_in(layer, each.after);
    return narrowed;
  }
  fail(ErrorCode::invalid_argument, "[inject] fault: expected one of {}; got {}", names, name);
}

const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = [] {
    std::vector<Fault> list;
    for (const Injection& each : injections()) list.push_back(each.fault);
    return list;
  }();
  return all;
}

Fault find_fault(const std::string& name) { return find_injection(name).fault; }

}  // namespace lockstep

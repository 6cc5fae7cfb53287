// Faults of RoPE and of positions.
#include <algorithm>
#include <cmath>

#include "nn/rope.h"
#include "tensor/fail.h"
#include "trace/fault_tools.h"

namespace lockstep {
namespace {

using nlohmann::json;

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
    if (!is_rope(site) || facts.rope_type != "default") return;
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
Why longer_than_a_chunk(const ModelFacts&, const Sequences& sequences) {
  return longest(sequences) > 8 ? Why() : Why("the text is no longer than a chunk");
}

// Q and K rotated at other positions than their own.
template <typename Cannot, typename Position>
Injection misplaced(Fault fault, Cannot cannot, Position position) {
  const auto rotate_there = [=](const ModelFacts& facts, const PassRows& rows, Tensor& x) {
    rotate(x, facts.head_dim, false, facts.rope_theta,
           [&](int64_t t) { return position(rows, static_cast<size_t>(t)); });
  };
  return {.fault = std::move(fault),
          .cannot =
              [=](const ModelFacts& facts, const Sequences& sequences) {
                const Why why = cannot(facts, sequences);
                return why ? why : default_rope(facts, sequences);
              },
          .before = rotated_anew(rotate_there),
          .keeps = kBeforeRope};
}

json without_rope_scaling(const ModelFacts& facts) {
  return {{"rope_scaling", nullptr},
          {"rope_parameters",
           {{"rope_type", "default"},
            {"rope_theta", facts.rope_theta},
            {"factor", nullptr},
            {"low_freq_factor", nullptr},
            {"high_freq_factor", nullptr},
            {"attention_factor", nullptr},
            {"beta_fast", nullptr},
            {"beta_slow", nullptr},
            {"original_max_position_embeddings", nullptr}}}};
}

json with_yarn_factor(const ModelFacts& facts, double (*change)(double)) {
  if (facts.rope_type != "yarn") return json::object();
  const char* key = facts.config.contains("rope_parameters") && !facts.config["rope_parameters"].is_null()
                        ? "rope_parameters"
                        : "rope_scaling";
  const nn::RoPE rope(facts.checkpoint->config(), facts.head_dim, facts.rope_theta);
  return {{key, {{"attention_factor", change(rope.attention_factor())}}}};
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

bool k_divides_as_q(const ModelFacts& f) {
  return f.heads == f.kv_heads || f.kv_heads * f.head_dim % (2 * f.heads) != 0;
}

}  // namespace

std::vector<Injection> rope_faults() {
  std::vector<Injection> all;
  all.push_back(
      {.fault = fault("rope-interleaved", 1, "rotates neighbours where halves are paired", "q_rope", "all"),
       .cannot = default_rope,
       .before = rotated_anew([](const ModelFacts& f, const PassRows& rows, Tensor& x) {
         rotate(x, f.head_dim, true, f.rope_theta,
                [&](int64_t t) { return rows.positions[static_cast<size_t>(t)]; });
       }),
       .keeps = kBeforeRope});
  all.push_back({.fault = fault("qk-not-unpermuted", 1, "leaves Q and K in the row order of GGUF files",
                                "q_proj", "all"),
                 .cannot = always,
                 .before = [](const ModelFacts& f, const PassRows&, int, Site site, Tensor& x, Seen&) {
                   if (site == Site::q_proj) unpermute_columns(x, f.heads);
                   if (site == Site::k_proj) unpermute_columns(x, f.kv_heads);
                 }});
  all.push_back(
      {.fault = fault("k-unpermuted-by-query-heads", 2, "un-permutes K with the number of query heads",
                      "k_proj", "all"),
       .cannot = [](const ModelFacts& f,
                    const Sequences&) { return k_divides_as_q(f) ? Why("heads do not divide so") : Why(); },
       .before = at(Site::k_proj, [](const ModelFacts& f, const PassRows&, int, Tensor& x, Seen&) {
         if (!k_divides_as_q(f)) unpermute_columns(x, f.heads);
       })});
  for (const char* type : {"linear", "llama3", "yarn"}) {
    all.push_back({.fault = fault(std::string("rope-") + type + "-ignored", 3,
                                  std::string("leaves out the ") + type + " scaling", "q_rope", "all"),
                   .cannot = [=](const ModelFacts& f, const Sequences&) { return scaled(type, f); },
                   .patch =
                       [=](const ModelFacts& f) {
                         return f.rope_type == type ? without_rope_scaling(f) : json::object();
                       }});
  }
  all.push_back({.fault = fault("rope-half-the-dims", 3, "rotates only half of each head", "q_rope", "all"),
                 .cannot = default_rope,
                 .before = rotated_anew([](const ModelFacts& f, const PassRows& rows, Tensor& x) {
                   rotate(x, f.head_dim / 4 * 2, false, f.rope_theta,
                          [&](int64_t t) { return rows.positions[static_cast<size_t>(t)]; });
                 }),
                 .keeps = kBeforeRope});
  all.push_back({.fault = fault("rope-theta", 3, "ten times the base", "q_rope", "all"),
                 .cannot = default_rope,
                 .patch = [](const ModelFacts& f) {
                   if (f.rope_type != "default") return json::object();
                   return json{
                       {"rope_theta", nullptr},
                       {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", f.rope_theta * 10}}}};
                 }});
  all.push_back(
      {.fault = fault("yarn-mscale-missing", 4, "leaves out YaRN's factor of Q and K", "q_rope", "all"),
       .cannot = [](const ModelFacts& f, const Sequences&) { return scaled("yarn", f); },
       .patch = [](const ModelFacts& f) { return with_yarn_factor(f, [](double) { return 1.0; }); }});
  all.push_back(
      {.fault = fault("yarn-mscale-twice", 4, "applies YaRN's factor twice", "q_rope", "all"),
       .cannot = [](const ModelFacts& f, const Sequences&) { return scaled("yarn", f); },
       .patch =
           [](const ModelFacts& f) { return with_yarn_factor(f, [](double once) { return once * once; }); }});
  all.push_back({.fault = fault("rope-flatten-heads", 5, "with L = 1 rotates head 0 and loses the others",
                                "q_rope", "1-", true),
                 .cannot = needs_decode,
                 .before = [](const ModelFacts&, const PassRows& rows, int, Site site, Tensor& x, Seen&) {
                   if (!is_rope(site) || rows.step == 0) return;
                   for (int64_t t = 0; t < x.shape()[0]; ++t)
                     std::fill(x.row(t) + x.shape()[2], x.row(t) + x.row_size(), 0.0F);
                 }});
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

}  // namespace lockstep

#include "nn/mlp.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lockstep::nn {
namespace {

// Weight of each expert for one row, 0 for those not chosen. logits, weights: [E].
void route_row(std::span<const float> logits, int64_t chosen, std::span<float> weights) {
  const float peak = *std::max_element(logits.begin(), logits.end());
  std::vector<float> probability(logits.size());
  float total = 0;
  for (size_t e = 0; e < logits.size(); ++e) total += probability[e] = std::exp(logits[e] - peak);
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return probability[a] > probability[b]; });
  float kept = 0;
  for (int64_t i = 0; i < chosen; ++i) kept += probability[order[i]] / total;
  std::fill(weights.begin(), weights.end(), 0.0F);
  for (int64_t i = 0; i < chosen; ++i) weights[order[i]] = probability[order[i]] / total / kept;
}

// The (row, expert) pairs of a pass, sorted by expert, then row.
struct Dispatch {
  std::vector<int32_t> rows;   // [pairs]
  std::vector<int64_t> first;  // [E + 1]: pairs of expert e are first[e] .. first[e + 1]
  std::vector<int64_t> pair;   // [T, E]: of a row and an expert; -1: not chosen

  int64_t experts() const { return static_cast<int64_t>(first.size()) - 1; }
};

Dispatch dispatch(const Tensor& weights) {
  const int64_t experts = weights.shape()[1];
  Dispatch plan;
  plan.pair.assign(static_cast<size_t>(weights.shape()[0] * experts), -1);
  for (int64_t e = 0; e < experts; ++e) {
    plan.first.push_back(static_cast<int64_t>(plan.rows.size()));
    for (int64_t t = 0; t < weights.shape()[0]; ++t) {
      if (weights.row(t)[e] == 0.0F) continue;
      plan.pair[t * experts + e] = static_cast<int64_t>(plan.rows.size());
      plan.rows.push_back(static_cast<int32_t>(t));
    }
  }
  plan.first.push_back(static_cast<int64_t>(plan.rows.size()));
  return plan;
}

// One product for each expert that has rows. x: the pairs' rows; y: [pairs, out].
void add_products(const Dispatch& plan, const Runtime& runtime, const quant::PackedWeight& weight, Role role,
                  Activations& x, Tensor& y, std::vector<Product>& products) {
  for (int64_t e = 0; e < weight.experts(); ++e) {
    const int64_t rows = plan.first[e + 1] - plan.first[e];
    if (rows == 0) continue;
    // Experts may be stored differently.
    const InputForm form = input_form(runtime, weight.matrix(e), role);
    x.prepare(form, weight.matrix(e), rows);
    products.push_back({&weight, e, &x, form, plan.first[e], rows, y.row(plan.first[e])});
  }
}

// Shows the pairs of an inner site spread over [T, E, width]; what an observer changes is gathered again.
void show_pairs(const Dispatch& plan, Tensor& pairs, int layer, Site site, Taps& tap) {
  if (tap.inner(site) == Interest::none) return;
  const int64_t width = pairs.row_size();
  const int64_t experts = plan.experts();
  const int64_t rows = static_cast<int64_t>(plan.pair.size()) / experts;
  Tensor spread = Tensor::zeros({rows, experts, width});
  const auto place = [&](int64_t e, int64_t p) { return spread.row(plan.rows[p]) + e * width; };
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t p = plan.first[e]; p < plan.first[e + 1]; ++p) std::copy_n(pairs.row(p), width, place(e, p));
  }
  tap(layer, site, spread);
  if (tap.inner(site) != Interest::change) return;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t p = plan.first[e]; p < plan.first[e + 1]; ++p) std::copy_n(place(e, p), width, pairs.row(p));
  }
}

// Each row's experts in ascending order. weights: [T, E]; y: [pairs, hidden] -> [T, hidden].
Tensor weighted_sum(const Dispatch& plan, const Tensor& weights, const Tensor& y, const Runtime& runtime) {
  const int64_t experts = plan.experts();
  const int64_t hidden = y.row_size();
  Tensor out = Tensor::zeros({weights.shape()[0], hidden});
  runtime.for_rows(weights.shape()[0], 4 * hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* sum = out.row(t);
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t pair = plan.pair[t * experts + e];
        if (pair < 0) continue;
        runtime.kernels->add_scaled(sum, y.row(pair), weights.row(t)[e], hidden);
      }
    }
  });
  return out;
}

}  // namespace

Tensor route(const Tensor& logits, int64_t experts_per_token) {
  Tensor weights(logits.shape());
  const auto experts = static_cast<size_t>(logits.row_size());
  for (int64_t t = 0; t < logits.shape()[0]; ++t)
    route_row({logits.row(t), experts}, experts_per_token, {weights.row(t), experts});
  return weights;
}

Tensor swiglu(Tensor gate, const Tensor& up, const Runtime& runtime) {
  runtime.for_rows(gate.shape()[0], gate.row_size(), [&](int64_t begin, int64_t end) {
    runtime.kernels->silu_mul(gate.row(begin), up.row(begin), gate.row(begin),
                              (end - begin) * gate.row_size());
  });
  return gate;
}

Tensor mlp(const Tensor& x, const Linear& gate, const Linear& up, const Linear& down, int layer, Taps& tap) {
  std::vector<Tensor> hidden = linear(x, {&gate, &up});
  tap(layer, Site::gate, hidden[0]);
  tap(layer, Site::up, hidden[1]);
  const Tensor act = tap(layer, Site::act, swiglu(std::move(hidden[0]), hidden[1], *gate.runtime));
  hidden.clear();  // the largest of a pass
  return tap(layer, Site::down, linear(act, down));
}

Tensor sparse_moe(const Tensor& x, const Linear& router, const SwitchGLU& experts, int64_t experts_per_token,
                  int layer, Taps& tap) {
  const Runtime& runtime = *experts.runtime;
  const Tensor logits = tap(layer, Site::router_logits, linear(x, router));
  Tensor weights = route(logits, experts_per_token);
  tap(layer, Site::router_weights, weights);

  const Dispatch plan = dispatch(weights);
  const auto pairs = static_cast<int64_t>(plan.rows.size());
  std::vector<Product> products;
  Activations in(runtime, x, plan.rows);
  Tensor gate({pairs, experts.gate->rows()});
  Tensor up({pairs, experts.up->rows()});
  add_products(plan, runtime, *experts.gate, Role::gate, in, gate, products);
  add_products(plan, runtime, *experts.up, Role::up, in, up, products);
  multiply(runtime, products);
  show_pairs(plan, gate, layer, Site::expert_gate, tap);
  show_pairs(plan, up, layer, Site::expert_up, tap);
  Tensor act = swiglu(std::move(gate), up, runtime);
  show_pairs(plan, act, layer, Site::expert_act, tap);

  products.clear();
  Activations middle(runtime, act);
  Tensor down({pairs, x.row_size()});
  add_products(plan, runtime, *experts.down, Role::moe_down, middle, down, products);
  multiply(runtime, products);
  show_pairs(plan, down, layer, Site::expert_down, tap);
  return tap(layer, Site::moe_out, weighted_sum(plan, weights, down, runtime));
}

}  // namespace lockstep::nn

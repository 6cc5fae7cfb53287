#include "trace/ties.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "nn/mlp.h"
#include "trace/compare.h"

namespace lockstep {
namespace {

// Experts that a row of weights chose. weights: [E]
std::vector<int> chosen_of(std::span<const float> weights) {
  std::vector<int> chosen;
  for (size_t e = 0; e < weights.size(); ++e)
    if (weights[e] != 0) chosen.push_back(static_cast<int>(e));
  return chosen;
}

}  // namespace

bool chosen_by(std::span<const float> weights, std::span<const float> logits) {
  float least = std::numeric_limits<float>::infinity(), most = -least;
  for (size_t e = 0; e < weights.size(); ++e)
    (weights[e] != 0 ? least : most) =
        weights[e] != 0 ? std::min(least, logits[e]) : std::max(most, logits[e]);
  return least >= most;
}

std::optional<double> exchanged_by(std::span<const float> ours, std::span<const float> theirs,
                                   std::span<const float> logits) {
  constexpr float kFar = std::numeric_limits<float>::infinity();
  float least = kFar, most = -kFar;             // of those that the reference chose, and of the others
  float worst_taken = kFar, best_left = -kFar;  // of those that only we chose, or only it
  int more = 0;
  for (size_t e = 0; e < theirs.size(); ++e) {
    const bool here = ours[e] != 0, there = theirs[e] != 0;
    (there ? least : most) = there ? std::min(least, logits[e]) : std::max(most, logits[e]);
    more += static_cast<int>(here) - static_cast<int>(there);
    if (here && !there) worst_taken = std::min(worst_taken, logits[e]);
    if (there && !here) best_left = std::max(best_left, logits[e]);
  }
  if (more != 0) return kFar;
  if (worst_taken == kFar) return {};
  return std::max(std::abs(least - worst_taken), std::abs(best_left - most));
}

double tie_margin(double floor, std::span<const float> logits) {
  return kBand * std::min(floor, kMostFloor) * norm(logits);
}

TieBreaker::TieBreaker(const TieRule& rule) : rule_(rule) {
  for (const TraceEvent& event : rule.reference->events()) {
    if (event.site != "router_logits" && event.site != "router_weights") continue;
    const auto experts = static_cast<size_t>(event.shape[1]);
    for (int64_t t = 0; t < event.shape[0]; ++t)
      (event.site == "router_logits"
           ? logits_
           : weights_)[{event.step, event.row, event.layer, event.first_position + t}] =
          event.values.subspan(static_cast<size_t>(t) * experts, experts);
  }
}

void TieBreaker::settle(const PassRows& rows, int layer, const Tensor& logits, Tensor& weights) {
  const int64_t experts = weights.row_size();
  for (int64_t t = 0; t < weights.shape()[0]; ++t) {
    const auto at = static_cast<size_t>(t);
    const Key key{rows.step, rows.sequences[at], layer, rows.positions[at]};
    const auto choice = weights_.find(key);
    const auto scores = logits_.find(key);
    if (choice == weights_.end() || scores == logits_.end()) continue;
    const auto width = static_cast<size_t>(experts);
    const std::span<const float> mine{weights.row(t), width}, own{logits.row(t), width};
    if (choice->second.size() != width || scores->second.size() != width || !chosen_by(mine, own) ||
        !chosen_by(choice->second, scores->second))
      continue;
    const double floor = rule_.floor->at(rows.step > 0, fmt::format("L{:02}.router_logits", layer), experts);
    const auto margin = exchanged_by(mine, choice->second, scores->second);
    if (!margin || *margin > tie_margin(floor, scores->second)) continue;
    ties_.push_back({rows.step, rows.sequences[at], layer, rows.positions[at], chosen_of(mine)});
    Tensor allowed = Tensor::zeros({1, experts});
    for (int64_t e = 0; e < experts; ++e)
      allowed.row(0)[e] = choice->second[static_cast<size_t>(e)] != 0
                              ? own[static_cast<size_t>(e)]
                              : -std::numeric_limits<float>::infinity();
    const auto count = static_cast<int64_t>(ties_.back().experts.size());
    const Tensor routed = nn::route(allowed, count);
    const float sum = std::accumulate(mine.begin(), mine.end(), 0.0F);
    for (int64_t e = 0; e < experts; ++e) weights.row(t)[e] = sum * routed.row(0)[e];
  }
}

}  // namespace lockstep

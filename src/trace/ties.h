// Ties of the router: experts of so nearly equal logits that correct computations choose differently.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <tuple>

#include "lockstep/divergence.h"
#include "trace/inject.h"

namespace lockstep {

/// How far the experts that two choices exchanged are from being chosen alike, by the logits: infinitely, if
/// one chose more of them. Nothing: the choices are the same. All: [E]; weights of experts not chosen are 0.
std::optional<double> exchanged_by(std::span<const float> ours, std::span<const float> theirs,
                                   std::span<const float> logits);

/// Whether no other expert has a larger logit than those that the weights chose. Both: [E]
bool chosen_by(std::span<const float> weights, std::span<const float> logits);

/// The largest margin that is a tie, by the reference's logits and their noise floor.
double tie_margin(double floor, std::span<const float> logits);

/// Settles ties of our router as a reference did, so that what follows can be compared.
class TieBreaker {
 public:
  explicit TieBreaker(const TieRule& rule);
  /// logits, weights: [T, E]; ours. Where both choices are right by their own logits and differ by no more
  /// than a tie, `weights` become those of the reference's experts by our logits; their sum stays.
  void settle(const PassRows& rows, int layer, const Tensor& logits, Tensor& weights);
  std::vector<Trace::Tie> take() { return std::move(ties_); }

 private:
  using Key = std::tuple<int, int, int, int64_t>;  // step, sequence, layer, position

  const TieRule& rule_;
  std::map<Key, std::span<const float>> logits_, weights_;
  std::vector<Trace::Tie> ties_;
};

}  // namespace lockstep

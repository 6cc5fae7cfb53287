#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "lockstep/generate.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

struct Candidate {
  int32_t id;
  float logit;
  float probability;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Uniform in [0, 1): splitmix64 of seed and position (Steele, Lea and Flood 2014).
double random_at(uint64_t seed, int64_t position) {
  const auto mix = [](uint64_t x) {
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9U;
    x = (x ^ x >> 27) * 0x94D049BB133111EBU;
    return x ^ x >> 31;
  };
  return static_cast<double>(mix(mix(seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

// Candidates best first, those beyond top-k gone.
void keep_top_k(std::vector<Candidate>& candidates, int64_t k) {
  if (k > 0 && k < static_cast<int64_t>(candidates.size())) {
    std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end(), better);
    candidates.resize(static_cast<size_t>(k));
  } else {
    std::sort(candidates.begin(), candidates.end(), better);
  }
}

void normalise(std::vector<Candidate>& candidates) {
  double total = 0;
  for (Candidate& c : candidates) {
    c.probability = std::exp(c.logit - candidates[0].logit);
    total += c.probability;
  }
  for (Candidate& c : candidates) c.probability = static_cast<float>(c.probability / total);
}

void keep_top_p(std::vector<Candidate>& candidates, float p) {
  if (p >= 1) return;
  double sum = 0;
  size_t kept = 0;
  while (kept < candidates.size() && (kept == 0 || sum < p)) sum += candidates[kept++].probability;
  candidates.resize(kept);
}

void keep_min_p(std::vector<Candidate>& candidates, float p) {
  const float least = p * candidates[0].probability;
  std::erase_if(candidates, [&](const Candidate& c) { return c.probability < least; });
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options) {
  const auto check = [](bool good, const char* name, const char* range, double value) {
    if (!good) {
      fail(ErrorCode::invalid_argument, "[sampling] {}: expected {}, got {}", name, range, value);
    }
  };
  check(options.temperature >= 0 && std::isfinite(options.temperature), "temperature", "0 or more",
        options.temperature);
  check(options.top_k >= 0, "top_k", "0 (all) or more", static_cast<double>(options.top_k));
  check(options.top_p > 0 && options.top_p <= 1, "top_p", "more than 0, at most 1", options.top_p);
  check(options.min_p >= 0 && options.min_p <= 1, "min_p", "0 to 1", options.min_p);
  check(options.repeat_penalty > 0 && std::isfinite(options.repeat_penalty), "repeat_penalty", "more than 0",
        options.repeat_penalty);
  check(options.repeat_window >= 0, "repeat_window", "0 or more", static_cast<double>(options.repeat_window));
  for (const auto& [id, bias] : options.logit_bias) check(!std::isnan(bias), "logit_bias", "numbers", bias);
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> context,
                        int64_t position) const {
  std::vector<float> adjusted(logits.begin(), logits.end());
  for (const auto& [id, bias] : options_.logit_bias) {
    if (id >= 0 && id < static_cast<int64_t>(adjusted.size())) adjusted[id] += bias;
  }
  if (std::any_of(adjusted.begin(), adjusted.end(), [](float x) { return std::isnan(x); })) {
    fail(ErrorCode::invalid_argument, "[sampling] logits: expected numbers, got NaN");
  }
  if (options_.repeat_penalty != 1) {
    const size_t window = std::min(context.size(), static_cast<size_t>(options_.repeat_window));
    const auto recent = context.last(window);
    for (int32_t id : std::set<int32_t>(recent.begin(), recent.end())) {
      float& logit = adjusted[id];
      logit = logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
    }
  }
  const auto best = std::max_element(adjusted.begin(), adjusted.end());
  if (!std::isfinite(*best)) {
    const bool were_finite = std::isfinite(*std::max_element(logits.begin(), logits.end()));
    fail(ErrorCode::invalid_argument, "[sampling] logits: expected a finite largest value, got {}{}", *best,
         were_finite ? " after the repeat penalty and biases" : "");
  }
  if (options_.temperature == 0) return static_cast<int32_t>(best - adjusted.begin());

  std::vector<Candidate> candidates(adjusted.size());
  for (size_t i = 0; i < adjusted.size(); ++i) {
    // Below the best: a small temperature would make infinities of several.
    candidates[i] = {static_cast<int32_t>(i), (adjusted[i] - *best) / options_.temperature, 0};
  }
  keep_top_k(candidates, options_.top_k);
  normalise(candidates);
  keep_top_p(candidates, options_.top_p);
  normalise(candidates);
  keep_min_p(candidates, options_.min_p);
  normalise(candidates);
  double left = random_at(options_.seed, position);
  for (const Candidate& c : candidates) {
    left -= c.probability;
    if (left < 0) return c.id;
  }
  return candidates.back().id;
}

Logprobs logprobs(std::span<const float> logits, int32_t chosen, int64_t count) {
  const float peak = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (float logit : logits) total += std::exp(static_cast<double>(logit) - peak);
  const double log_total = std::log(total) + peak;
  const auto of = [&](int32_t id) { return TokenLogprob{id, static_cast<float>(logits[id] - log_total)}; };
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto kept = std::clamp<int64_t>(count, 0, std::ssize(order));
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  Logprobs result{of(chosen), {}};
  for (int64_t i = 0; i < kept; ++i) result.top.push_back(of(order[i]));
  return result;
}

}  // namespace lockstep

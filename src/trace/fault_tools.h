// What the files of faults share.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "trace/inject.h"

namespace lockstep {

using Seen = std::map<Site, Tensor>;
using Sequences = std::vector<Trace::Sequence>;
using Why = std::optional<std::string>;

std::vector<Injection> rope_faults();
std::vector<Injection> attention_faults();
std::vector<Injection> layer_faults();
std::vector<Injection> weight_faults();

/// Tokens of the longest sequence, decode steps included.
inline int64_t longest(const Sequences& sequences) {
  size_t most = 0;
  for (const auto& each : sequences) most = std::max(most, each.ids.size() + each.fed.size());
  return static_cast<int64_t>(most);
}
inline bool has_decode(const Sequences& sequences) {
  return std::ranges::any_of(sequences, [](const auto& each) { return !each.fed.empty(); });
}
inline Why needs_decode(const ModelFacts&, const Sequences& sequences) {
  return has_decode(sequences) ? Why() : Why("there are no decode steps");
}
inline Why needs_rows(const ModelFacts&, const Sequences& sequences) {
  return sequences.size() > 1 && has_decode(sequences) ? Why()
                                                       : Why("there is one sequence, or no decode step");
}
inline Why needs_experts(const ModelFacts& facts, const Sequences&) {
  return facts.experts > 0 ? Why() : Why("the model has no experts");
}
inline Why always(const ModelFacts&, const Sequences&) { return {}; }

inline void scale(Tensor& x, float factor) {
  for (float& value : x.values()) value *= factor;
}

/// A hook for one site, every layer.
template <typename Change>
Injection::Hook at(Site where, Change change) {
  return [=](const ModelFacts& facts, const PassRows& rows, int layer, Site site, Tensor& x, Seen& seen) {
    if (site == where) change(facts, rows, layer, x, seen);
  };
}

inline Fault fault(std::string name, int kind, std::string summary, std::string site, std::string heads = "",
                   bool decode = false, int row = 0) {
  return {std::move(name), kind, std::move(summary), std::move(site), decode, std::move(heads), row};
}

}  // namespace lockstep

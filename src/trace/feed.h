// Our model run on a reference's tensors.
#pragma once

#include <set>
#include <string>
#include <utility>

#include "lockstep/divergence.h"
#include "trace/inject.h"

namespace lockstep {

/// A copy of a trace with the events that are wanted.
template <typename Wanted>
Trace only(const Trace& whole, Wanted wanted) {
  Trace part = whole;
  part.drop_events();
  for (const TraceEvent& event : whole.events()) {
    if (wanted(event)) part.add(event, event.values);
  }
  return part;
}

/// Sites that a trace lacks: {"step 1, sequence 0", "L00.q_rope"}.
using MissingSites = std::set<std::pair<std::string, std::string>>;

/// Runs our model with the tensors of a trace in the place of ours, wherever the trace holds one.
class Feeder {
 public:
  /// `options`: model, KV type and fault; the tokens are those of the trace that is fed.
  Feeder(const std::filesystem::path& path, const TraceOptions& options);
  /// What our operations made of it, site by site, before it was replaced. `missing`: gets the sites of its
  /// level that the trace lacks for a pass.
  Trace run(const Trace& fed, MissingSites* missing = nullptr) const;

 private:
  TraceOptions options_;
  Checkpoint checkpoint_;
  ModelFacts facts_;
  std::optional<Injection> injection_;
  std::shared_ptr<const Model> model_;
};

}  // namespace lockstep

// Our model run on a reference's tensors.
#pragma once

#include "lockstep/divergence.h"
#include "trace/inject.h"

namespace lockstep {

/// Runs our model with the tensors of a trace in the place of ours, wherever the trace holds one.
class Feeder {
 public:
  /// `options`: model, KV type and fault; the tokens are those of the trace that is fed.
  Feeder(const std::filesystem::path& path, const TraceOptions& options);
  /// What our operations made of it, site by site, before it was replaced.
  Trace run(const Trace& fed) const;

 private:
  TraceOptions options_;
  Checkpoint checkpoint_;
  ModelFacts facts_;
  std::optional<Injection> injection_;
  std::shared_ptr<const Model> model_;
};

}  // namespace lockstep

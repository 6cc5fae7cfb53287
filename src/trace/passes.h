// The passes of a trace: one ragged prefill, then decode steps of all sequences together.
#pragma once

#include <memory>
#include <vector>

#include "lockstep/divergence.h"
#include "trace/inject.h"

namespace lockstep {

/// "T H D"
std::string axes_of(Site site);
/// Whether traces of a level hold a site.
bool in_level(Site site, int level);

/// Runs them; `rows` tells the observer which rows are being computed. Returns what was fed.
std::vector<Trace::Sequence> run_passes(const std::shared_ptr<const Model>& model,
                                        const TraceOptions& options, PassRows& rows, Observer& observer);

}  // namespace lockstep

// What of a tensor a trace keeps: all of it, some of its columns, or a random projection of them.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep {

std::string_view storage_name(TraceStorage::Kind kind);

/// Whether tensors of this width and these axes are kept whole: short rows are, and the router's.
bool kept_whole(const TraceStorage& storage, int64_t width, const std::string& axes);

/// values: rows of `width`, each reduced to storage.count numbers (docs/trace-format.md has the formula).
std::vector<float> reduce(std::span<const float> values, int64_t width, const TraceStorage& storage);

}  // namespace lockstep

// What a model's own mathematics promises, seen through its taps: no reference is needed.
#pragma once

#include <span>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep {

/// Attention, RoPE, grouped queries, experts and windows against what follows from their definitions, on
/// `ids` (random ones). `fault`: injected into every run.
std::vector<CheckResult> check_symmetries(const std::filesystem::path& model, const ModelOptions& options,
                                          KvType kv_type, std::span<const int32_t> ids,
                                          const std::string& fault);

}  // namespace lockstep

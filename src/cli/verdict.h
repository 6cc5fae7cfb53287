// How the verbs that look for faults end, and the fault that they may be given.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <string>

#include "cli.h"

namespace lockstep::cli {

// Exit statuses beside those of errors.h.
inline constexpr int kDivergent = 1;
inline constexpr int kInconclusive = 2;

/// Whether there is such a file; false too where that cannot be known.
inline bool present(const std::filesystem::path& path) {
  std::error_code unknown;
  return std::filesystem::exists(path, unknown);
}

/// Runs a verb to the end of its output: what it says decides only if it was said.
void to_the_end(const std::function<void()>& run);
/// What the comparing verbs cannot read is neither a difference nor none; a model that does not load is a
/// matter of usage.
void or_inconclusive(const std::function<void()>& run, const ModelFlags* flags = nullptr);
/// The verbs that compare nothing conclude nothing either.
void or_usage(const std::function<void()>& run);

/// --inject on a verb. `list` prints the faults and ends there, whatever else the verb requires.
void declare_inject(CLI::App& verb, std::string& fault, const std::string& description);

}  // namespace lockstep::cli

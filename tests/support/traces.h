// The committed traces of transformers, and ours of the same tokens.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep::test {

/// A trace of tests/data/traces, and the model it is of.
std::filesystem::path captured(const std::string& name);
std::filesystem::path model_of(const std::string& name);
/// What another engine computed of the tokens of such a trace: tests/data/subjects.
std::filesystem::path subject(const std::string& name);

/// Options to record ours on the tokens of a trace, as fine as it.
TraceOptions follow(const Trace& reference);
/// And its choices where ours are ties; both must outlive the options.
TraceOptions follow(const Trace& reference, const Floor& floor);

/// A copy of a trace, each event of which may be changed, or left out by returning false.
Trace edited(const Trace& trace, const std::function<bool(TraceEvent&, std::vector<float>&)>& edit);

}  // namespace lockstep::test

// What becomes of config keys that no model file has read.
#pragma once

#include <string>
#include <vector>

#include "lockstep/checkpoint.h"

namespace lockstep {

/// Keys that nothing read and that cannot change what is computed, for `inspect`. Error `unsupported`
/// naming the first unread key that looks as if it could.
std::vector<std::string> check_unread_keys(const Config& config);

}  // namespace lockstep

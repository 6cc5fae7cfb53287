// Throwing lockstep::Error with a formatted message.
#pragma once

#include <fmt/core.h>

#include <utility>

#include "lockstep/error.h"

namespace lockstep {

/// Throws Error(code, format(args...)). Messages read `[where] rule: expected ..., got ...`.
template <typename... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace lockstep

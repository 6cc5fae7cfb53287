// JSON from a file. Everything that walks a value recurses, so its depth is bounded here.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "tensor/fail.h"

namespace lockstep {

/// Error `format` for what is no JSON, or nested deeper than any file is on purpose.
inline nlohmann::json parse_json(std::string_view text, const std::string& where) {
  using nlohmann::json;
  constexpr int kDeepest = 100;
  try {
    return json::parse(text.begin(), text.end(), [&](int depth, json::parse_event_t, const json&) {
      if (depth > kDeepest) {
        fail(ErrorCode::format, "[{}] JSON: expected at most {} levels, got more", where, kDeepest);
      }
      return true;
    });
  } catch (const json::exception& error) {
    // Past "[json.exception.parse_error.101] "; what it quotes may be as long as the file.
    std::string reason = error.what();
    reason = reason.substr(reason.find("] ") + 2, 200);
    fail(ErrorCode::format, "[{}] JSON: expected JSON, got {}", where, reason);
  }
}

}  // namespace lockstep

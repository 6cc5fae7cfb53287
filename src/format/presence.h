// Whether a file is there to be opened.
#pragma once

#include <filesystem>

namespace lockstep {

/// False for what is absent or cannot be a name. A link to nothing, and what may not be looked at, count as
/// there: opening them says what is wrong.
inline bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::symlink_status(path, error).type();
  if (type == std::filesystem::file_type::none) return error == std::errc::permission_denied;
  return type != std::filesystem::file_type::not_found;
}

}  // namespace lockstep

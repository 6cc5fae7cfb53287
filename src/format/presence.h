// What lies where a path leads, asked without exceptions of the standard library.
#pragma once

#include <algorithm>
#include <filesystem>
#include <vector>

#include "tensor/fail.h"

namespace lockstep {

/// False for what is absent or cannot be a name. A link to nothing, and what may not be looked at, count as
/// there: opening them says what is wrong.
inline bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::symlink_status(path, error).type();
  if (type == std::filesystem::file_type::none) return error == std::errc::permission_denied;
  return type != std::filesystem::file_type::not_found;
}

/// False for what is absent or may not be looked at, too.
inline bool is_file(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}
inline bool is_folder(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error);
}

/// What lies in a directory, sorted. Error `io` if it cannot be read.
inline std::vector<std::filesystem::path> entries_of(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> paths;
  std::error_code error;
  std::filesystem::directory_iterator at(directory, error);
  for (const std::filesystem::directory_iterator end; !error && at != end; at.increment(error))
    paths.push_back(at->path());
  if (error) fail(ErrorCode::io, "[{}] read: {}", directory.string(), error.message());
  std::ranges::sort(paths);
  return paths;
}

}  // namespace lockstep

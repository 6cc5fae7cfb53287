// Writing a file so that it is either whole or not there.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace lockstep {

/// Writes the parts one after the other to a temporary name beside `path`, then renames it. Where
/// `path` is a link, that is what it points to. Error `io` with the system's reason, and nothing left behind.
void write_file(const std::filesystem::path& path, std::span<const std::span<const std::byte>> parts);

}  // namespace lockstep

// A file mapped read-only.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace lockstep {

/// Maps a whole file. Move-only; unmaps on destruction.
class MemoryMap {
 public:
  /// Error `not_found` or `io` with the system's reason.
  explicit MemoryMap(const std::filesystem::path& path);
  ~MemoryMap();
  MemoryMap(MemoryMap&& other) noexcept;
  MemoryMap& operator=(MemoryMap&& other) noexcept;

  std::span<const std::byte> bytes() const { return bytes_; }
  const std::filesystem::path& path() const { return path_; }
  /// Copies `part` of the mapping to `out` without mapping its pages, which costs a page's worth of
  /// bookkeeping and room. Error `io` if the file has become shorter, or cannot be read.
  void read(std::span<const std::byte> part, std::byte* out) const;

 private:
  std::filesystem::path path_;
  int file_ = -1;
  std::span<const std::byte> bytes_;
};

}  // namespace lockstep

// A file mapped read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace lockstep {

/// Bytes that this process may fill: the machine's memory, bounded by the cgroup's limit.
int64_t usable_memory();

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
  /// Maps pages of `part`, those that the system maps together, so that `fetch` waits for fewer. Errors as
  /// of `fetch`.
  void map(std::span<const std::byte> part) const;
  /// Brings `part` of the mapping, a few pages, into the caches, so that it can be read in any order without
  /// waiting for memory. Error `io` if the file has become shorter.
  void fetch(std::span<const std::byte> part) const;
  /// Lets go of the pages of `part`, which are mapped anew if they are read again.
  void release(std::span<const std::byte> part) const;

 private:
  void require(std::span<const std::byte> part) const;

  std::filesystem::path path_;
  int file_ = -1;
  std::span<const std::byte> bytes_;
};

}  // namespace lockstep

#include "tensor/memory_map.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "tensor/fail.h"

namespace lockstep {

int64_t usable_memory() {
  int64_t bytes = int64_t{::sysconf(_SC_PHYS_PAGES)} * ::sysconf(_SC_PAGESIZE);
  int64_t limit = 0;
  std::ifstream file("/sys/fs/cgroup/memory.max");  // cgroup v2: bytes, or "max"
  if (file >> limit) bytes = std::min(bytes, limit);
  return bytes;
}

MemoryMap::MemoryMap(const std::filesystem::path& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make it wait
  if (fd < 0) {
    fail(errno == ENOENT ? ErrorCode::not_found : ErrorCode::io, "[{}] open: {}", path.string(),
         std::strerror(errno));
  }
  struct stat info{};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    fail(ErrorCode::io, "[{}] open: expected a regular file", path.string());
  }
  const auto size = static_cast<size_t>(info.st_size);
  void* data = nullptr;
  if (size > 0) {
    data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
      const int reason = errno;
      ::close(fd);
      fail(ErrorCode::io, "[{}] map: {}", path.string(), std::strerror(reason));
    }
  }
  file_ = fd;
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MemoryMap::~MemoryMap() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  if (file_ >= 0) ::close(file_);
}

MemoryMap::MemoryMap(MemoryMap&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      bytes_(std::exchange(other.bytes_, {})) {}

MemoryMap& MemoryMap::operator=(MemoryMap&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

// To read what a file has lost since it was mapped would end the process.
void MemoryMap::require(std::span<const std::byte> part) const {
  struct stat info{};
  const auto end = static_cast<off_t>(part.data() + part.size() - bytes_.data());
  if (::fstat(file_, &info) != 0) fail(ErrorCode::io, "[{}] read: {}", path_.string(), std::strerror(errno));
  if (info.st_size < end) {
    fail(ErrorCode::io, "[{}] read: expected {} bytes, got {}; the file was cut short since it was opened",
         path_.string(), end, info.st_size);
  }
}

namespace {

// Reads a byte of `part` every `step`.
void touch(std::span<const std::byte> part, size_t step) {
  for (size_t i = 0; i < part.size(); i += step)
    static_cast<void>(*static_cast<const volatile std::byte*>(&part[i]));
}

}  // namespace

void MemoryMap::map(std::span<const std::byte> part) const {
  require(part);
  constexpr size_t kAround = size_t{64} << 10;  // what Linux maps at once of what it has (fault_around_bytes)
  touch(part, kAround);
}

void MemoryMap::fetch(std::span<const std::byte> part) const {
  require(part);
  touch(part, 64);  // a line of the caches
}

void MemoryMap::release(std::span<const std::byte> part) const {
  // Who reads beside it has the system map pages around, some of them let go of before: so all of a large
  // page.
  constexpr size_t kGranule = size_t{2} << 20;
  const auto at = static_cast<size_t>(part.data() - bytes_.data());
  const size_t begin = at / kGranule * kGranule;
  const size_t end = std::min((at + part.size() + kGranule - 1) / kGranule * kGranule, bytes_.size());
  ::madvise(const_cast<std::byte*>(bytes_.data()) + begin, end - begin, MADV_DONTNEED);
}

}  // namespace lockstep

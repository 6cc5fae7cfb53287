#include "tensor/memory_map.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "tensor/fail.h"

namespace lockstep {

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

void MemoryMap::read(std::span<const std::byte> part, std::byte* out) const {
  auto offset = static_cast<off_t>(part.data() - bytes_.data());
  for (size_t left = part.size(); left > 0;) {
    const ssize_t count = ::pread(file_, out, left, offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      fail(ErrorCode::io, "[{}] read at byte {}: {}", path_.string(), offset,
           count < 0 ? std::strerror(errno)
                     : "expected more bytes; the file was cut short since it was opened");
    }
    out += count;
    offset += count;
    left -= static_cast<size_t>(count);
  }
}

}  // namespace lockstep

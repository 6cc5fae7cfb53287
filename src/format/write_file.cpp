#include "format/write_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// 0, or errno.
int write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return 0;
}

int write_parts(int fd, std::span<const std::span<const std::byte>> parts) {
  for (const auto& part : parts) {
    if (const int reason = write_all(fd, part); reason != 0) return reason;
  }
  return 0;
}

// What a link points to, even if nothing is there yet: that is replaced, not the link.
std::filesystem::path end_of_links(std::filesystem::path path) {
  constexpr int kMostLinks = 40;  // as the kernel follows
  std::error_code none;
  for (int i = 0; i < kMostLinks && std::filesystem::is_symlink(path, none); ++i)
    path = path.parent_path() / std::filesystem::read_symlink(path, none);
  return path;
}

}  // namespace

void write_file(const std::filesystem::path& path, std::span<const std::span<const std::byte>> parts) {
  if (path.empty()) fail(ErrorCode::invalid_argument, "[output] path: expected a file name, got none");
  struct stat info{};
  // A device or a pipe (/dev/stdout) has no place beside it, and nothing to replace.
  const bool in_place = ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode);
  const std::filesystem::path target = in_place ? path : end_of_links(path);
  std::string name = target.string();
  if (!in_place) name += ".XXXXXX";
  const int fd = in_place ? ::open(name.c_str(), O_WRONLY | O_CLOEXEC) : ::mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) fail(ErrorCode::io, "[{}] create: {}", path.string(), std::strerror(errno));
  int reason = write_parts(fd, parts);
  if (!in_place) {
    const mode_t mask = ::umask(0);
    ::umask(mask);
    if (reason == 0 && ::fchmod(fd, 0666 & ~mask) != 0) reason = errno;
  }
  if (::close(fd) != 0 && reason == 0) reason = errno;
  if (reason == 0 && !in_place && ::rename(name.c_str(), target.c_str()) != 0) reason = errno;
  if (reason == 0) return;
  if (!in_place) ::unlink(name.c_str());
  fail(ErrorCode::io, "[{}] write: {}", path.string(), std::strerror(reason));
}

}  // namespace lockstep

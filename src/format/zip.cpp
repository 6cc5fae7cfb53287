#include "format/zip.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "tensor/fail.h"

namespace lockstep {
namespace {

constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEntrySignature = 0x02014b50;
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr size_t kEndSize = 22;
constexpr size_t kEntrySize = 46;
constexpr size_t kLocalSize = 30;
constexpr size_t kLongestComment = 65535;
constexpr uint16_t kEncrypted = 1;
constexpr uint16_t kStored = 0;
constexpr uint16_t kDeflated = 8;

// A little-endian number at a place that the caller has checked.
template <typename T>
T number(std::span<const std::byte> bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

// `count` bytes at `at`, or an error.
std::span<const std::byte> piece(std::span<const std::byte> archive, uint64_t at, uint64_t count,
                                 const std::string& name) {
  if (at > archive.size() || count > archive.size() - at) {
    fail(ErrorCode::format, "[{}@{}] zip: expected {} bytes, got {}", name, at, count,
         archive.size() - std::min<uint64_t>(at, archive.size()));
  }
  return archive.subspan(at, count);
}

// The end record is last, but for a comment.
size_t find_end(std::span<const std::byte> archive, const std::string& name) {
  const size_t lowest = archive.size() - std::min(archive.size(), kEndSize + kLongestComment);
  for (size_t at = archive.size(); at >= lowest + kEndSize; --at) {
    if (number<uint32_t>(archive, at - kEndSize) == kEndSignature) return at - kEndSize;
  }
  fail(ErrorCode::format, "[{}] zip: expected an end record, got none; the file is cut or no zip archive",
       name);
}

}  // namespace

ZipMember find_zip_member(std::span<const std::byte> archive, std::string_view member,
                          const std::string& name) {
  const size_t end = find_end(archive, name);
  const auto entries = number<uint16_t>(archive, end + 10);
  uint64_t at = number<uint32_t>(archive, end + 16);
  for (int e = 0; e < entries; ++e) {
    const auto entry = piece(archive, at, kEntrySize, name);
    if (number<uint32_t>(entry, 0) != kEntrySignature) {
      fail(ErrorCode::format, "[{}@{}] zip: expected a directory entry, got other bytes", name, at);
    }
    const auto name_size = number<uint16_t>(entry, 28);
    const auto title = piece(archive, at + kEntrySize, name_size, name);
    at += kEntrySize + name_size + number<uint16_t>(entry, 30) + number<uint16_t>(entry, 32);
    if (std::string_view(reinterpret_cast<const char*>(title.data()), title.size()) != member) continue;

    const auto method = number<uint16_t>(entry, 10);
    const auto stored = number<uint32_t>(entry, 20);
    const auto size = number<uint32_t>(entry, 24);
    const auto offset = number<uint32_t>(entry, 42);
    constexpr uint32_t kZip64 = 0xffffffff;
    if ((number<uint16_t>(entry, 8) & kEncrypted) != 0 || (method != kStored && method != kDeflated) ||
        stored == kZip64 || size == kZip64 || offset == kZip64) {
      fail(ErrorCode::format, "[{}] zip member {}: expected it stored or deflated, got another form", name,
           member);
    }
    const auto local = piece(archive, offset, kLocalSize, name);
    if (number<uint32_t>(local, 0) != kLocalSignature) {
      fail(ErrorCode::format, "[{}@{}] zip: expected a local header, got other bytes", name, offset);
    }
    const uint64_t start =
        uint64_t{offset} + kLocalSize + number<uint16_t>(local, 26) + number<uint16_t>(local, 28);
    if (method == kStored && stored != size) {
      fail(ErrorCode::format, "[{}] zip member {}: expected {} bytes, got {}", name, member, size, stored);
    }
    return {method == kDeflated, size, piece(archive, start, stored, name)};
  }
  fail(ErrorCode::format, "[{}] zip: expected a member {}, got none of that name", name, member);
}

void read_zip_member(const ZipMember& member, const std::string& name,
                     const std::function<void(std::span<const std::byte>)>& sink) {
  if (!member.deflated) return sink(member.data);
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) fail(ErrorCode::io, "[{}] inflate: out of memory", name);
  struct Guard {
    z_stream* stream;
    ~Guard() { inflateEnd(stream); }
  } guard{&stream};
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(member.data.data()));
  stream.avail_in = static_cast<uInt>(member.data.size());
  std::vector<std::byte> buffer(size_t{1} << 18);  // [256 Ki]
  int64_t done = 0;
  for (int state = Z_OK; state != Z_STREAM_END;) {
    stream.next_out = reinterpret_cast<Bytef*>(buffer.data());
    stream.avail_out = static_cast<uInt>(buffer.size());
    state = inflate(&stream, Z_NO_FLUSH);
    const size_t made = buffer.size() - stream.avail_out;
    done += static_cast<int64_t>(made);
    if ((state != Z_OK && state != Z_STREAM_END) || (state == Z_OK && made == 0) || done > member.size) {
      fail(ErrorCode::format, "[{}] inflate: damaged after {} bytes", name, done);
    }
    sink(std::span(buffer).first(made));
  }
  if (done != member.size) {
    fail(ErrorCode::format, "[{}] inflate: expected {} bytes, got {}", name, member.size, done);
  }
}

}  // namespace lockstep

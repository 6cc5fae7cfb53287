// One member of a zip archive (wheels are zip archives), read with every bound checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace lockstep {

/// Where a member lies in its archive, from the central directory (PKWARE APPNOTE 6.3, 4.3.12).
struct ZipMember {
  bool deflated = false;            ///< else stored as it is
  int64_t size = 0;                 ///< bytes once inflated
  std::span<const std::byte> data;  ///< the stored bytes
};

/// Finds `member`. `name` is the archive's, for messages. Error `format` for what is no zip archive, one
/// that is cut, encrypted or in a newer form (zip64), and for a member that is not there.
ZipMember find_zip_member(std::span<const std::byte> archive, std::string_view member,
                          const std::string& name);

/// Hands the member's bytes to `sink` piece by piece, never more than `member.size` in all. Error `format`
/// if the stored bytes are damaged or inflate to another size.
void read_zip_member(const ZipMember& member, const std::string& name,
                     const std::function<void(std::span<const std::byte>)>& sink);

}  // namespace lockstep

#include "format/zip.h"

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "tensor/fail.h"

namespace lockstep::fuzz {

void fuzz_zip(const uint8_t* data, size_t size) {
  constexpr int64_t kMost = 16 << 20;
  attempt([&] {
    const ZipMember member = find_zip_member(bytes_of(data, size), "pkg/model.gguf", "f.whl");
    int64_t done = 0;
    read_zip_member(member, "f.whl", [&](std::span<const std::byte> bytes) {
      done += static_cast<int64_t>(bytes.size());
      require(done <= member.size);
      if (done > kMost) fail(ErrorCode::format, "[f.whl] size: expected at most {}, got {}", kMost, done);
    });
    require(done == member.size);
  });
}

}  // namespace lockstep::fuzz

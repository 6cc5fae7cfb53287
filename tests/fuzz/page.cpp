#include "format/download.h"
#include "format/pull.h"
#include "fuzz/support.h"
#include "fuzz/targets.h"

namespace lockstep::fuzz {

void fuzz_page(const uint8_t* data, size_t size) {
  const std::string page(text_of(data, size));
  for (const char* type : {"application/vnd.pypi.simple.v1+json", "text/html"}) {
    attempt([&] {
      const std::string link = find_wheel_link(page, type, "a-1.whl");
      if (link.empty()) return;
      const std::string url = absolute_url("https://host/simple/a/", link);
      require(url.starts_with("https://") || url.starts_with("http://"));
    });
  }
}

}  // namespace lockstep::fuzz

// SHA-256 checksums.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>

struct evp_md_ctx_st;

namespace lockstep {

class Sha256 {
 public:
  Sha256();
  void add(std::span<const std::byte> bytes);
  /// The sum of what was added, in lower-case hexadecimal digits; once.
  std::string hex();

 private:
  std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

/// Of a whole file. Error `not_found` or `io`.
std::string sha256_of(const std::filesystem::path& path);

}  // namespace lockstep

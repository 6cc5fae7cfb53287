#include "format/sha256.h"

#include <fmt/core.h>
#include <openssl/evp.h>

#include "tensor/memory_map.h"

namespace lockstep {

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
  EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr);
}

void Sha256::add(std::span<const std::byte> bytes) {
  EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size());
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  EVP_DigestFinal_ex(context_.get(), digest, &size);
  std::string text;
  for (unsigned i = 0; i < size; ++i) text += fmt::format("{:02x}", digest[i]);
  return text;
}

std::string sha256_of(const std::filesystem::path& path) {
  const MemoryMap map(path);
  Sha256 sum;
  sum.add(map.bytes());
  return sum.hex();
}

}  // namespace lockstep

#include "models/architecture.h"

#include <algorithm>
#include <string>
#include <vector>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// A function's static, so that entries of other files may register before this file is initialised.
std::vector<const ArchitectureEntry*>& entries() {
  static std::vector<const ArchitectureEntry*> list;
  return list;
}

}  // namespace

ArchitectureEntry::ArchitectureEntry(std::string_view name, Sizes sizes, Make make)
    : name(name), sizes(sizes), make(make) {
  entries().push_back(this);
}

const ArchitectureEntry& architecture_of(const Checkpoint& checkpoint) {
  std::vector<std::string_view> names;
  for (const ArchitectureEntry* entry : entries()) {
    if (entry->name == checkpoint.architecture()) return *entry;
    names.push_back(entry->name);
  }
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string_view name : names) all += (all.empty() ? "" : ", ") + std::string(name);
  fail(ErrorCode::unsupported, "[{}] architecture: expected one of {}, got {}", checkpoint.path().string(),
       all, checkpoint.architecture());
}

}  // namespace lockstep

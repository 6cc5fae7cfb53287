#include "models/architecture.h"

#include <algorithm>

namespace lockstep {
namespace {

// A function's static, so that entries of other files may register before this file is initialised.
std::vector<const ArchitectureEntry*>& entries() {
  static std::vector<const ArchitectureEntry*> list;
  return list;
}

}  // namespace

ArchitectureEntry::ArchitectureEntry(std::string_view name, Make make) : name(name), make(make) {
  entries().push_back(this);
}

const ArchitectureEntry* find_architecture(std::string_view name) {
  for (const ArchitectureEntry* entry : entries()) {
    if (entry->name == name) return entry;
  }
  return nullptr;
}

std::vector<std::string_view> architecture_names() {
  std::vector<std::string_view> names;
  for (const ArchitectureEntry* entry : entries()) names.push_back(entry->name);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace lockstep

#include "tensor/arena.h"

#include <bit>
#include <cstdlib>
#include <new>
#include <vector>

namespace lockstep::arena {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallest = 4096;
// What a thread keeps for reuse; more than this goes back to the system.
constexpr size_t kKept = size_t{32} << 20;

// Sizes in steps of a quarter of a power of two, so that at most a fifth of a buffer is unused.
size_t round_up(size_t bytes) {
  if (bytes <= kSmallest) return kSmallest;
  const size_t step = std::bit_floor(bytes - 1) / 4;
  return (bytes + step - 1) / step * step;
}

struct FreeList {
  struct Entry {
    void* buffer;
    size_t bytes;
  };
  std::vector<Entry> entries;
  size_t kept = 0;

  ~FreeList() {
    for (const Entry& entry : entries) std::free(entry.buffer);
  }
};

thread_local FreeList free_list;

}  // namespace

void* acquire(size_t bytes) {
  const size_t size = round_up(bytes);
  for (size_t i = free_list.entries.size(); i-- > 0;) {
    if (free_list.entries[i].bytes != size) continue;
    void* buffer = free_list.entries[i].buffer;
    free_list.entries.erase(free_list.entries.begin() + static_cast<ptrdiff_t>(i));
    free_list.kept -= size;
    return buffer;
  }
  void* buffer = std::aligned_alloc(kAlignment, size);
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

void release(void* buffer, size_t bytes) {
  const size_t size = round_up(bytes);
  if (free_list.kept + size > kKept) {
    std::free(buffer);
    return;
  }
  free_list.entries.push_back({buffer, size});
  free_list.kept += size;
}

}  // namespace lockstep::arena

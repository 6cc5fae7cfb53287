// Recycled buffers for activations: a forward pass asks for the same sizes again and again, and
// fresh pages from the system would cost more than the arithmetic on small models.
#pragma once

#include <cstddef>
#include <memory>

namespace lockstep::arena {

/// At least `bytes` bytes, 64-byte aligned, contents undefined.
void* acquire(size_t bytes);
/// Gives a buffer back; `bytes` as asked for.
void release(void* buffer, size_t bytes);

/// A recycled array of plain elements, contents undefined.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t count)
      : data_(static_cast<T*>(acquire(count * sizeof(T))), Release{count * sizeof(T)}) {}
  T* data() const { return data_.get(); }

 private:
  struct Release {
    size_t bytes = 0;
    void operator()(T* data) const { release(data, bytes); }
  };
  std::unique_ptr<T[], Release> data_;
};

}  // namespace lockstep::arena

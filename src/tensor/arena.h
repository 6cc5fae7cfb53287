// Recycled buffers for activations: a forward pass asks for the same sizes again and again, and
// fresh pages from the system would cost more than the arithmetic on small models.
#pragma once

#include <cstddef>

namespace lockstep::arena {

/// At least `bytes` bytes, 64-byte aligned, contents undefined.
void* acquire(size_t bytes);
/// Gives a buffer back; `bytes` as asked for.
void release(void* buffer, size_t bytes);

}  // namespace lockstep::arena

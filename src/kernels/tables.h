// The tables that are linked in, one an ISA, and whether this processor runs them. A table is
// constant-initialised: its file must execute nothing before the check.
#pragma once

#include "kernels/kernels.h"

namespace lockstep::kernels {

/// Whether weights that are read once come past the caches: on AMD's processors the faster, on Intel's by far
/// the slower.
extern const bool kPastCaches;
/// Whether memory is read faster panel after panel than two of them side by side: on AMD's processors.
extern const bool kOneStream;
/// Whether so many rows take one panel at a time; more of them would multiply too slowly.
inline bool takes_one_stream(int64_t rows) { return kOneStream && rows <= 2; }

extern const Table kScalar;
#if defined(__x86_64__)
extern const Table kAvx2;
extern const Table kAvx512;
bool avx2_runs_here();
bool avx512_runs_here();
/// A table like `base`, named avx512bf16, with products of bf16 pairs.
Table with_bf16_pairs(const Table& base);
bool avx512bf16_runs_here();
#endif

}  // namespace lockstep::kernels

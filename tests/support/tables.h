// The kernel tables that tests compare: those of this processor, and AVX-512 emulated (SIMDe) where
// the processor lacks it.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace lockstep::kernels {
extern const Table kEmulatedAvx512;
}

namespace lockstep::test {

inline std::vector<const kernels::Table*> tables() {
  std::vector<const kernels::Table*> all(kernels::available().begin(), kernels::available().end());
  all.push_back(&kernels::kEmulatedAvx512);
  return all;
}

}  // namespace lockstep::test

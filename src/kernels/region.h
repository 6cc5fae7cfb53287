// Target regions: code between BEGIN and END is compiled for an instruction set, without flags for
// the whole file, so that no std:: function is compiled for it by accident. Include all standard
// headers before BEGIN. With LOCKSTEP_EMULATED_ISA the intrinsics are functions and no target is set.
#pragma once

#define LOCKSTEP_PRAGMA(text) _Pragma(#text)
#if defined(LOCKSTEP_EMULATED_ISA)
#define LOCKSTEP_TARGET_BEGIN(isa)
#define LOCKSTEP_TARGET_END
#elif defined(__clang__)
#define LOCKSTEP_TARGET_BEGIN(isa) \
  LOCKSTEP_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LOCKSTEP_TARGET_END LOCKSTEP_PRAGMA(clang attribute pop)
#else
#define LOCKSTEP_TARGET_BEGIN(isa) LOCKSTEP_PRAGMA(GCC push_options) LOCKSTEP_PRAGMA(GCC target(isa))
#define LOCKSTEP_TARGET_END LOCKSTEP_PRAGMA(GCC pop_options)
#endif

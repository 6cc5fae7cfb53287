// Target regions: code between BEGIN and END is compiled for an instruction set, without flags for
// the whole file, so that no std:: function is compiled for it by accident. Include all standard
// headers before BEGIN. A build that emulates an instruction set defines both macros as nothing.
#pragma once

#ifndef LOCKSTEP_TARGET_BEGIN

#define LOCKSTEP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LOCKSTEP_TARGET_BEGIN(isa) \
  LOCKSTEP_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LOCKSTEP_TARGET_END LOCKSTEP_PRAGMA(clang attribute pop)
#else
#define LOCKSTEP_TARGET_BEGIN(isa) \
  LOCKSTEP_PRAGMA(GCC push_options) LOCKSTEP_PRAGMA(GCC target(isa))
#define LOCKSTEP_TARGET_END LOCKSTEP_PRAGMA(GCC pop_options)
#endif
#endif

// Stands in for the compiler's <immintrin.h> when the AVX-512 kernels are built for emulation: the
// same names, computed portably by SIMDe, so that they are tested on processors that lack them.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant/half.h"

// What SIMDe 0.7.4 lacks, element by element, as Intel's guide defines it.
using __mmask16 = simde__mmask16;

template <typename To, typename From, typename Result, typename Source, typename Function>
inline Result emulate(Source x, Function function) {
  constexpr size_t kCount = sizeof(Result) / sizeof(To);
  std::array<From, sizeof(Source) / sizeof(From)> in;
  std::array<To, kCount> out;
  static_assert(in.size() >= kCount);
  std::memcpy(in.data(), &x, sizeof(x));
  for (size_t i = 0; i < kCount; ++i) out[i] = function(in[i]);
  Result result;
  std::memcpy(&result, out.data(), sizeof(result));
  return result;
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
  return emulate<int32_t, float, __m512i>(x, [](float v) {
    const float rounded = std::nearbyint(v);
    return rounded >= -0x1p31F && rounded < 0x1p31F ? static_cast<int32_t>(rounded) : INT32_MIN;
  });
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  return emulate<float, int32_t, __m512>(x, [](int32_t v) { return static_cast<float>(v); });
}
inline __m512i _mm512_srai_epi32(__m512i x, unsigned n) {
  return emulate<int32_t, int32_t, __m512i>(x, [=](int32_t v) { return v >> n; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return emulate<int32_t, uint16_t, __m512i>(x, [](uint16_t v) { return static_cast<int32_t>(v); });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return emulate<int32_t, uint8_t, __m512i>(x, [](uint8_t v) { return static_cast<int32_t>(v); });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return emulate<int32_t, int8_t, __m512i>(x, [](int8_t v) { return static_cast<int32_t>(v); });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  return emulate<int8_t, int32_t, __m128i>(x, [](int32_t v) { return static_cast<int8_t>(v); });
}
inline __m512 _mm512_cvtph_ps(__m256i x) { return emulate<float, uint16_t, __m512>(x, lockstep::f16_value); }
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
  return emulate<uint16_t, float, __m256i>(x, lockstep::to_f16);
}
// NaN, zeros and infinities, what 0x9F asks for; the kernels ask for nothing else.
inline __mmask16 _mm512_fpclass_ps_mask(__m512 x, int classes) {
  float lanes[16];
  std::memcpy(lanes, &x, sizeof(x));
  __mmask16 mask = 0;
  for (int i = 0; i < 16 && classes == 0x9F; ++i) {
    if (!std::isfinite(lanes[i]) || lanes[i] == 0) mask |= static_cast<__mmask16>(1U << i);
  }
  return mask;
}
// SIMDe defines the name with the parameters of another function.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(x, y) simde_mm512_madd_epi16(x, y)

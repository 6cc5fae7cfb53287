// AVX-512 BF16: so far only its limit is measured.
#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/region.h"

LOCKSTEP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16")

namespace lockstep::kernels {
namespace {

int64_t multiply_pairs(int64_t rounds) {
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a, e = a;
  __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5F), _mm512_set1_ps(0.5F));
  for (int64_t i = 0; i < rounds; ++i) {
    a = _mm512_dpbf16_ps(a, x, x);
    b = _mm512_dpbf16_ps(b, x, x);
    c = _mm512_dpbf16_ps(c, x, x);
    d = _mm512_dpbf16_ps(d, x, x);
    e = _mm512_dpbf16_ps(e, x, x);
  }
  const __m512 total = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), e);
  // The result must matter, or the compiler leaves the loop out.
  return _mm512_cvtss_f32(total) >= 0 ? rounds * 5 * 32 * 2 : 0;
}

}  // namespace
}  // namespace lockstep::kernels

LOCKSTEP_TARGET_END

namespace lockstep::kernels {

int64_t peak_bf16(int64_t rounds) {
  return __builtin_cpu_supports("avx512bf16") ? multiply_pairs(rounds) : 0;
}

}  // namespace lockstep::kernels

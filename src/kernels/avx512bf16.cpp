// AVX-512 BF16: so far only its limit is measured.
#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "kernels/kernels.h"
#include "kernels/region.h"

LOCKSTEP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16")

namespace lockstep::kernels {
namespace {

constexpr int kSums = 10;  // latency of five cycles, two a cycle

template <size_t... S>
int64_t multiply_pairs(int64_t rounds, std::index_sequence<S...>) {
  __m512 sums[] = {_mm512_set1_ps(static_cast<float>(S))...};
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5F), _mm512_set1_ps(0.5F));
  for (int64_t i = 0; i < rounds; ++i) ((sums[S] = _mm512_dpbf16_ps(sums[S], x, x)), ...);
  __m512 total = _mm512_setzero_ps();
  ((total = _mm512_add_ps(total, sums[S])), ...);
  // The result must matter, or the compiler leaves the loop out.
  return _mm512_cvtss_f32(total) >= 0 ? rounds * kSums * 32 * 2 : 0;
}

}  // namespace
}  // namespace lockstep::kernels

LOCKSTEP_TARGET_END

namespace lockstep::kernels {

int64_t peak_bf16(int64_t rounds) {
  return __builtin_cpu_supports("avx512bf16") ? multiply_pairs(rounds, std::make_index_sequence<kSums>()) : 0;
}

}  // namespace lockstep::kernels

// AVX-512 with BF16: the AVX-512 kernels, and products of bf16 pairs besides.
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "kernels/kernels.h"
#include "kernels/region.h"
#include "kernels/tables.h"

LOCKSTEP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16")

namespace lockstep::kernels {
namespace {

constexpr int64_t kLanes = quant::kPanelRows;

// Products of R rows with P panels, by pairs of columns.
template <int R, int P>
void pair_rows(const LinearArgs& args, int64_t panel, int64_t row) {
  const std::byte* at = args.weight->panel(panel);
  const int64_t panel_bytes = args.weight->panel_bytes;
  const uint16_t* x = args.x_bf16 + row * args.x_stride;
  __m512 acc[P][R];
  // Early, so that they become registers (see LOCKSTEP_UNROLL_SUMS).
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) acc[p][r] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < args.weight->columns; k += 2, at += 64) {
    __m512i weights[P];
    for (int p = 0; p < P; ++p) {
      weights[p] = _mm512_loadu_si512(at + p * panel_bytes);
      // A single row of a single panel runs ahead by itself, like those of codes.
      if (row == 0 && R * P > 1) __builtin_prefetch(at + p * panel_bytes + 4096);
    }
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * args.x_stride + k, 4);
      const auto value = (__m512bh)_mm512_set1_epi32(pair);
      for (int p = 0; p < P; ++p) acc[p][r] = _mm512_dpbf16_ps(acc[p][r], (__m512bh)weights[p], value);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const int64_t first = (panel + p) * kLanes;
    const int64_t count = std::min(kLanes, args.weight->rows - first);
    const auto lanes = static_cast<__mmask16>((1U << count) - 1);
    for (int r = 0; r < R; ++r)
      _mm512_mask_storeu_ps(args.y + (row + r) * args.y_stride + first, lanes, acc[p][r]);
  }
}

template <int P>
void pair_panels(const LinearArgs& args, int64_t panel) {
  int64_t row = 0;
  for (; row + 8 <= args.rows; row += 8) pair_rows<8, P>(args, panel, row);
  if (row + 4 <= args.rows) pair_rows<4, P>(args, panel, row), row += 4;
  if (row + 2 <= args.rows) pair_rows<2, P>(args, panel, row), row += 2;
  if (row < args.rows) pair_rows<1, P>(args, panel, row);
}

void linear_bf16(const LinearArgs& args, int64_t begin, int64_t end) {
  const bool one_stream = takes_one_stream(args.rows);
  for (; begin + 2 <= end && !one_stream; begin += 2) pair_panels<2>(args, begin);
  for (; begin < end; ++begin) pair_panels<1>(args, begin);
}

void to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(n - i >= kLanes ? 0xFFFF : (1U << (n - i)) - 1);
    const __m512 values = _mm512_maskz_loadu_ps(lanes, x + i);
    _mm256_mask_storeu_epi16(y + i, lanes, (__m256i)_mm512_cvtneps_pbh(values));
  }
  if (n % 2 != 0) y[n] = 0;
}

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
int64_t peak_bf16(int64_t rounds) { return multiply_pairs(rounds, std::make_index_sequence<kSums>()); }

}  // namespace
}  // namespace lockstep::kernels

LOCKSTEP_TARGET_END

namespace lockstep::kernels {

bool avx512bf16_runs_here() { return avx512_runs_here() && __builtin_cpu_supports("avx512bf16"); }

Table with_bf16_pairs(const Table& base) {
  Table table = base;
  table.isa = "avx512bf16";
  table.linear_bf16 = linear_bf16;
  table.to_bf16 = to_bf16;
  table.peak_bf16 = peak_bf16;
  return table;
}

}  // namespace lockstep::kernels

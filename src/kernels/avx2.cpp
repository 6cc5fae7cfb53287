// AVX2 with FMA and F16C: 16 lanes are two registers.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernels.h"
#include "kernels/region.h"
#include "kernels/tables.h"

LOCKSTEP_TARGET_BEGIN("avx2,fma,f16c")

namespace lockstep::kernels {
namespace {

constexpr std::string_view kName = "avx2";
constexpr int kRowTile = 6;        // rows of activations that share an unpacked weight, f32
constexpr int kRowTileFixed = 4;   // the same in fixed point,
constexpr int kRowTilePlanes = 2;  // and where a row has two planes
constexpr bool kRowsInTurn = false;
constexpr int kFewWideBits = 5;     // the widest codes that few rows of 16 bits multiply in two planes
constexpr int kManyTileWide = 4;    // the same where there are many rows, in 16 bits
constexpr int kManyTileNarrow = 4;  // and in 8
constexpr bool kManyWideSumsInMemory = false;
constexpr int kUnpackRows = 12;         // from so many rows on codes are unpacked once for all of them
constexpr int kPanelTile = 1;           // panels that share a broadcast activation
constexpr bool kLoadsRunAhead = false;  // one row multiplies so fast that its loads need no fetching
constexpr int kNarrowBits = 6;    // the widest codes for which products with 8-bit activations are the faster
constexpr int kQueryTile = 4;     // queries that share loaded keys and values,
constexpr int kKeyParts = 1;      // of so many times 16 keys
constexpr int kValueVectors = 1;  // and dimensions
constexpr int kPeakSums = 5;      // of two registers each
constexpr int kPeakDots = 4;

// 16 floats, 16 int32, 64 bytes.
struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct B {
  __m256i a, b;
};

inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// A NaN in y comes through both.
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline I round_to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
// Words packed from I by `_mm256_packs_epi32`, x before y, as bytes. Packing works within halves of 128 bits:
// the order is put right afterwards.
inline void store_low_bytes(int8_t* p, __m256i x, __m256i y) {
  const __m256i low = _mm256_set1_epi16(0xFF);
  const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(x, low), _mm256_and_si256(y, low));
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
}
// The lowest byte of each, which has at most 16 bits.
inline void store_bytes(int8_t* p, I x, I y) {
  store_low_bytes(p, _mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b));
}
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F times_power(F x, F power) { return x * power; }
inline bool any_special(F) { return false; }
// x * 2^n for n in [-125, 128], in two factors: 2^128 has no float of its own.
inline __m256 scale_by_power(__m256 x, __m256i n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(126)), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(bits)), _mm256_set1_ps(2.0F));
}
inline F scale_by_power(F x, I n) { return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)}; }
// Lanes i with first <= i < last keep x, others take y.
inline F select_range(int first, int last, F x, F y) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto pick = [&](int base, __m256 in, __m256 out) {
    const __m256i not_before = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - base - 1));
    const __m256i before_last = _mm256_cmpgt_epi32(_mm256_set1_epi32(last - base), lane);
    return _mm256_blendv_ps(out, in, _mm256_castsi256_ps(_mm256_and_si256(not_before, before_last)));
  };
  return {pick(0, x.a, y.a), pick(8, x.b, y.b)};
}
// 8 + 8, 4 + 4, 2 + 2, 1 + 1: the tree that every ISA follows.
inline float sum(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(F x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
// Magnitudes are compared as integers: infinity is above all numbers, and NaN above infinity.
inline __m256i larger(__m256 x, __m256 y) {
  return _mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y));
}
inline F larger_magnitude(F x, F y) {
  x = abs(x), y = abs(y);
  return {_mm256_castsi256_ps(larger(x.a, y.a)), _mm256_castsi256_ps(larger(x.b, y.b))};
}
inline float largest_magnitude(F x) {
  x = abs(x);
  const __m256i eight = larger(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  four = _mm_max_epi32(four, _mm_srli_epi64(four, 32));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
// Minus the sums of x and of y.
inline void minus_sums(I x, I y, int32_t* sums) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_add_epi32(x.a, x.b), _mm256_add_epi32(y.a, y.b));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  four = _mm_sub_epi32(_mm_setzero_si128(), _mm_hadd_epi32(four, four));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), four);
}

inline F load_f16(const void* p) {
  const auto* half = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
inline void store_f16(void* p, F x) {
  auto* half = static_cast<__m128i*>(p);
  _mm_storeu_si128(half, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(half + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline F load_bf16(const void* p) {
  const auto* half = static_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(half)), widen_bf16(_mm_loadu_si128(half + 1))};
}
// The first or second of 16 pairs.
inline F load_bf16_pair(const void* p, int i) {
  const auto* bytes = static_cast<const __m256i*>(p);
  const auto pick = [&](__m256i pairs) {
    return _mm256_castsi256_ps(i == 0 ? _mm256_slli_epi32(pairs, 16)
                                      : _mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  };
  return {pick(_mm256_loadu_si256(bytes)), pick(_mm256_loadu_si256(bytes + 1))};
}
inline F load_u8(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return to_float(I{_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))});
}
inline F load_i8(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return to_float(I{_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
}

inline B load_bytes(const void* p) {
  const auto* bytes = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(bytes), _mm256_loadu_si256(bytes + 1)};
}
inline B operator&(B x, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline B operator|(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
// Shifts of 16-bit lanes: the caller masks what crosses a byte.
inline B operator>>(B x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
inline B operator<<(B x, int n) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
inline void store_bytes(void* p, B x) {
  auto* bytes = static_cast<__m256i*>(p);
  _mm256_storeu_si256(bytes, x.a);
  _mm256_storeu_si256(bytes + 1, x.b);
}
// Byte `i` (0..3) of each of the 16 groups of four, as float.
inline F quad_column(B x, int i) {
  const __m256i low = _mm256_set1_epi32(0xFF);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * i), low)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * i), low))};
}
inline I int_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// Four bytes or two words of activations, in every lane.
inline B broadcast(const int8_t* x) {
  int32_t lane;
  std::memcpy(&lane, x, 4);
  return {_mm256_set1_epi32(lane), _mm256_set1_epi32(lane)};
}

// Products of unsigned codes with signed bytes, four columns at a time. Pairs add up in 16 bits, exactly for
// as many quads as `run` says. Codes of 8 bits do not fit.
struct ByteProducts {
  static constexpr bool kGoesOn = false;
  static constexpr bool kChained = false;
  static constexpr bool kUnsignedDigits = false;
  static constexpr int kWidePlanes = 2;
  static constexpr int kVectors = 1;  // that a quad of codes becomes
  static constexpr int run(int bits) { return 1 << (7 - bits); }
  static constexpr int digits_at(int quad, int plane, int) { return 32 * plane + 4 * quad; }

  template <int kBits>
  static void split(B quad, B* vectors) {
    vectors[0] = quad;
  }
  static I add(I sum, B codes, B x) {
    return {_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(codes.a, x.a)),
            _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(codes.b, x.b))};
  }
  static I total(I sum) { return times(sum, 1); }
  static I high_total(I sum) { return times(sum, 256); }
  static void store_wide(int8_t* digits, I x, I y) {
    const __m256i words[] = {_mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b)};
    store_low_bytes(digits, high(words[0]), high(words[1]));
    store_low_bytes(digits + 32, words[0], words[1]);
  }

 private:
  static __m256i high(__m256i words) {
    return _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(128)), 8);
  }
  // Pairs of 16-bit sums, each times `factor`.
  static I times(I sum, int16_t factor) {
    const __m256i factors = _mm256_set1_epi16(factor);
    return {_mm256_madd_epi16(sum.a, factors), _mm256_madd_epi16(sum.b, factors)};
  }
};
// Products of signed codes with unsigned bytes, 128 more than the activations: what is to be taken off
// depends on codes alone, and is where sums start. Those of 16 columns fit 16 bits, whatever they are on the
// way.
struct ManyByteProducts : ByteProducts {
  static constexpr bool kGoesOn = true;
  static constexpr bool kUnsignedDigits = true;
  static constexpr int alike(int) { return kNarrowBits; }
  static constexpr int taken_off(int, int offset) { return offset; }
  static constexpr int run(int) { return 4; }

  static I add(I sum, B codes, B x) { return ByteProducts::add(sum, x, codes); }
  static B minus(B codes, int offset) {
    const __m256i bytes = _mm256_set1_epi8(static_cast<char>(offset));
    return {_mm256_sub_epi8(codes.a, bytes), _mm256_sub_epi8(codes.b, bytes)};
  }
  // sum + 128 * codes
  static I add_raised(I sum, B codes) {
    const __m256i raised = _mm256_set1_epi8(static_cast<char>(128));
    return add(sum, codes, {raised, raised});
  }
  static void store_start(std::byte* p, I raised) {
    const __m256i none = _mm256_setzero_si256();
    store_bytes(p, B{_mm256_sub_epi16(none, raised.a), _mm256_sub_epi16(none, raised.b)});
  }
  static I start(const std::byte* p) {
    const B sums = load_bytes(p);
    return {sums.a, sums.b};
  }
};
// Pairs of 16 bits, multiplied and added to sum.
inline I add_words(I sum, B x, B y) {
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)),
          _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
}
// x as 16 bits each; packing works within halves of 128 bits.
inline __m256i pack_words(I x) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), _MM_SHUFFLE(3, 1, 2, 0));
}
inline void store_words(int16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_words(x));
}

// Products of codes with activations of 16 bits, two columns at a time: of a quad first columns 0 and 2, then
// 1 and 3, as they come out of its bytes with one operation each.
struct WordProducts {
  static constexpr bool kGoesOn = true;
  static constexpr bool kChained = false;
  static constexpr bool kUnsignedDigits = false;
  static constexpr int kWidePlanes = 1;
  static constexpr int alike(int) { return 8; }
  static constexpr int taken_off(int, int offset) { return offset; }
  static constexpr int kVectors = 2;
  static constexpr int run(int) { return 8; }
  static constexpr int digits_at(int quad, int, int vector) { return 8 * quad + 4 * vector; }

  template <int kBits>
  static void split(B quad, B* vectors) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    vectors[0] = {_mm256_and_si256(quad.a, low), _mm256_and_si256(quad.b, low)};
    vectors[1] = quad >> 8;
  }
  static I add(I sum, B codes, B x) { return add_words(sum, codes, x); }
  static I total(I sum) { return sum; }
  static B minus(B codes, int offset) {
    const __m256i words = _mm256_set1_epi16(static_cast<int16_t>(offset));
    return {_mm256_sub_epi16(codes.a, words), _mm256_sub_epi16(codes.b, words)};
  }
  static void store_wide(int8_t* digits, I x, I y) {
    store_quads(digits, x);
    store_quads(digits + 32, y);
  }

 private:
  static void store_quads(int8_t* digits, I x) {
    __m256i words = pack_words(x);
    words = _mm256_shufflelo_epi16(words, _MM_SHUFFLE(3, 1, 2, 0));
    words = _mm256_shufflehi_epi16(words, _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(digits), words);
  }
};
using WideProducts = ByteProducts;
using ManyWideProducts = WordProducts;

inline I set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
// x * ratios[0] + y * ratios[1], all of 16 bits.
inline I join(I x, I y, const int16_t* ratios) {
  int32_t pair;
  std::memcpy(&pair, ratios, sizeof(pair));
  const auto half = [&](__m256i first, __m256i second) {
    const __m256i words = _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xAA);
    return _mm256_madd_epi16(words, _mm256_set1_epi32(pair));
  };
  return {half(x.a, y.a), half(x.b, y.b)};
}
inline I shift_left(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }

// In memory the sums of a tile do better: registers are too few.
#define LOCKSTEP_UNROLL_SUMS
#include "kernels/generic/all.h"
#undef LOCKSTEP_UNROLL_SUMS

}  // namespace

bool avx2_runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
constinit const Table kAvx2 = make_table();

}  // namespace lockstep::kernels

LOCKSTEP_TARGET_END

// AVX-512 with VNNI: 16 lanes are one register, and four int8 products add up in one instruction.
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

LOCKSTEP_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace lockstep::kernels {
namespace {

constexpr std::string_view kName = "avx512";
constexpr int kRowTile = 8;         // rows of activations that share an unpacked weight, f32
constexpr int kRowTileFixed = 32;   // the same in fixed point,
constexpr int kRowTilePlanes = 32;  // and where a row has two planes
constexpr bool kRowsInTurn = true;  // each meets a block of codes before the next block is taken
constexpr int kFewWideBits = 8;     // the widest codes that few rows of 16 bits multiply in two planes
constexpr int kManyTileWide = 8;    // the same where there are many rows, in 16 bits: one sum,
constexpr bool kManyWideSumsInMemory = true;  // while those in f32 would not fit the registers
constexpr int kManyTileNarrow = 4;            // and in 8 bits
constexpr int kUnpackRows = 24;               // from so many rows on codes are unpacked once for all of them
constexpr int kPanelTile = 2;                 // panels that share a broadcast activation
constexpr bool kLoadsRunAhead = true;         // one row multiplies so fast that its loads need no fetching
constexpr int kNarrowBits = 8;    // the widest codes for which products with 8-bit activations are the faster
constexpr int kQueryTile = 4;     // queries that share loaded keys and values,
constexpr int kKeyParts = 4;      // of so many times 16 keys
constexpr int kValueVectors = 4;  // and dimensions
constexpr int kPeakSums = 14;     // five cycles, two a cycle, and some to spare
constexpr int kPeakDots = 14;

// 16 floats, 16 int32, 64 bytes.
struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct B {
  __m512i v;
};

inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F zero() { return {_mm512_setzero_ps()}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline F operator+(F x, F y) { return {_mm512_add_ps(x.v, y.v)}; }
inline F operator-(F x, F y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline F operator*(F x, F y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline F operator/(F x, F y) { return {_mm512_div_ps(x.v, y.v)}; }
inline F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
// A NaN in y comes through both.
inline F max(F x, F y) { return {_mm512_max_ps(x.v, y.v)}; }
inline F min(F x, F y) { return {_mm512_min_ps(x.v, y.v)}; }
inline F abs(F x) { return {_mm512_abs_ps(x.v)}; }
inline I round_to_int(F x) { return {_mm512_cvtps_epi32(x.v)}; }
// The lowest byte of each.
inline void store_bytes(int8_t* p, I x, I y) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm512_cvtepi32_epi8(y.v));
}
inline F to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
// x * power, a power of two, as a sum of exponents: where both and the product are normal numbers.
inline F times_power(F x, F power) {
  const __m512i less = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(127 << 23));
  return {_mm512_castsi512_ps(_mm512_add_epi32(less, _mm512_castps_si512(power.v)))};
}
// Whether any lane is 0 or not finite.
inline bool any_special(F x) {
  return _mm512_fpclass_ps_mask(x.v, 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x80) != 0;
}
// x * 2^n for n in [-125, 128].
inline F scale_by_power(F x, I n) { return {_mm512_scalef_ps(x.v, _mm512_cvtepi32_ps(n.v))}; }
// Lanes i with first <= i < last keep x, others take y.
inline F select_range(int first, int last, F x, F y) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 not_before = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first));
  const __mmask16 before_last = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(last), lane);
  return {_mm512_mask_blend_ps(not_before & before_last, y.v, x.v)};
}
inline __m256 low_half(F x) { return _mm512_castps512_ps256(x.v); }
inline __m256 high_half(F x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)); }
// 8 + 8, 4 + 4, 2 + 2, 1 + 1: the tree that every ISA follows.
inline float sum(F x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(F x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
// Magnitudes are compared as integers: infinity is above all numbers, and NaN above infinity.
inline F larger_magnitude(F x, F y) {
  return {
      _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(abs(x).v), _mm512_castps_si512(abs(y).v)))};
}
inline float largest_magnitude(F x) {
  const __m512i bits = _mm512_castps_si512(abs(x).v);
  const __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  four = _mm_max_epi32(four, _mm_srli_epi64(four, 32));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
inline __m256i sum_halves(I x) {
  return _mm256_add_epi32(_mm512_castsi512_si256(x.v), _mm512_extracti64x4_epi64(x.v, 1));
}
// Minus the sums of x and of y.
inline void minus_sums(I x, I y, int32_t* sums) {
  const __m256i pairs = _mm256_hadd_epi32(sum_halves(x), sum_halves(y));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  four = _mm_sub_epi32(_mm_setzero_si128(), _mm_hadd_epi32(four, four));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), four);
}

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F load_f16(const void* p) { return {_mm512_cvtph_ps(load_256(p))}; }
inline void store_f16(void* p, F x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_bf16(const void* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16))};
}
// The first or second of 16 pairs.
inline F load_bf16_pair(const void* p, int i) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(i == 0 ? _mm512_slli_epi32(pairs, 16)
                                     : _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
}
inline F load_u8(const void* p) { return to_float(I{_mm512_cvtepu8_epi32(load_128(p))}); }
inline F load_i8(const void* p) { return to_float(I{_mm512_cvtepi8_epi32(load_128(p))}); }

inline B load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline B operator&(B x, uint8_t mask) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
inline B operator|(B x, B y) { return {_mm512_or_si512(x.v, y.v)}; }
// Shifts of 16-bit lanes: the caller masks what crosses a byte.
inline B operator>>(B x, int n) { return {_mm512_srli_epi16(x.v, static_cast<unsigned>(n))}; }
inline B operator<<(B x, int n) { return {_mm512_slli_epi16(x.v, static_cast<unsigned>(n))}; }
inline void store_bytes(void* p, B x) { _mm512_storeu_si512(p, x.v); }
// Byte `i` (0..3) of each of the 16 groups of four, as float.
inline F quad_column(B x, int i) {
  const __m512i shifted = _mm512_srli_epi32(x.v, static_cast<unsigned>(8 * i));
  return to_float(I{_mm512_and_si512(shifted, _mm512_set1_epi32(0xFF))});
}

inline I int_zero() { return {_mm512_setzero_si512()}; }
// Four bytes of activations, in every lane.
inline B broadcast(const int8_t* x) {
  int32_t lane;
  std::memcpy(&lane, x, 4);
  return {_mm512_set1_epi32(lane)};
}

inline I set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I operator+(I x, I y) { return {_mm512_add_epi32(x.v, y.v)}; }
inline I operator-(I x, I y) { return {_mm512_sub_epi32(x.v, y.v)}; }
// x * ratios[0] + y * ratios[1], all of 16 bits.
inline I join(I x, I y, const int16_t* ratios) {
  int32_t pair;
  std::memcpy(&pair, ratios, sizeof(pair));
  const __m512i words = _mm512_mask_blend_epi16(0xAAAAAAAA, x.v, _mm512_slli_epi32(y.v, 16));
  return {_mm512_madd_epi16(words, _mm512_set1_epi32(pair))};
}
// Pairs of 16 bits, multiplied and added to sum. In a loop GCC keeps what its own function takes and what it
// returns in two registers, and moves one to the other.
inline I add_words(I sum, B x, B y) {
#if defined(LOCKSTEP_EMULATED_ISA) || defined(__clang__)
  return {_mm512_dpwssd_epi32(sum.v, x.v, y.v)};
#else
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(y.v));
  return sum;
#endif
}
// What fits 16 bits.
inline void store_words(int16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(x.v));
}
inline I shift_left(I x, int n) { return {_mm512_slli_epi32(x.v, static_cast<unsigned>(n))}; }

// Products of unsigned codes with signed bytes, four columns at a time, summed in int32.
struct ByteProducts {
  static constexpr bool kGoesOn = true;
  static constexpr bool kChained = false;
  static constexpr bool kUnsignedDigits = false;
  static constexpr int kWidePlanes = 2;
  static constexpr int kVectors = 1;  // that a quad of codes becomes
  static constexpr int run(int) { return 8; }
  static constexpr int digits_at(int quad, int plane, int) { return 32 * plane + 4 * quad; }

  template <int kBits>
  static void split(B quad, B* vectors) {
    vectors[0] = quad;
  }
  static I add(I sum, B codes, B x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, x.v)}; }
  // With four bytes of activations that are wanted once, from where they lie: GCC would load them apart, and
  // the fewer instructions, the more memory is asked for at once.
  static I add(I sum, B codes, const int8_t* x) {
#if defined(LOCKSTEP_EMULATED_ISA) || defined(__clang__)
    return add(sum, codes, broadcast(x));
#else
    using Four = int8_t[4];
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(codes.v), "m"(*reinterpret_cast<const Four*>(x)));
    return sum;
#endif
  }
  static I total(I sum) { return sum; }
  static I high_total(I sum) { return shift_left(sum, 8); }
  static void store_wide(int8_t* digits, I x, I y) { store_planes<128>(digits, x, y); }

 protected:
  // The high plane, of (n + kRaised) / 256, and the low one.
  template <int kRaised>
  static void store_planes(int8_t* digits, I x, I y) {
    const auto high = [](I n) {
      return I{_mm512_srai_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(kRaised)), 8)};
    };
    store_bytes(digits, high(x), high(y));
    store_bytes(digits + 32, x, y);
  }
};
using WideProducts = ByteProducts;

// Products of signed codes with unsigned bytes. Activations of 16 bits are 256 * (high - 128) + low: what is
// to be taken off depends on codes alone, and is where the sum of high bytes starts. That of low bytes goes
// on from it, shifted: all in one register.
struct ManyByteProducts : ByteProducts {
  static constexpr bool kChained = true;
  static constexpr bool kUnsignedDigits = true;
  static constexpr int alike(int) { return 8; }
  static constexpr int taken_off(int bits, int offset) { return bits == 8 ? 128 : offset; }
  static B minus(B codes, int offset) {
    return {_mm512_sub_epi8(codes.v, _mm512_set1_epi8(static_cast<char>(offset)))};
  }
  static I add(I sum, B codes, B x) { return {_mm512_dpbusd_epi32(sum.v, x.v, codes.v)}; }
  // sum + 128 * codes
  static I add_raised(I sum, B codes) {
    return {_mm512_dpbusd_epi32(sum.v, _mm512_set1_epi8(static_cast<char>(128)), codes.v)};
  }
  static void store_start(std::byte* p, I raised) {
    _mm512_storeu_si512(p, _mm512_sub_epi32(_mm512_setzero_si512(), raised.v));
  }
  static I start(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
  static void store_wide(int8_t* digits, I x, I y) { store_planes<128 << 8>(digits, x, y); }
};
using ManyWideProducts = ManyByteProducts;

// Before a loop that begins or ends the sums of a tile, and is in no other loop: such loops GCC unrolls early
// only where told to, and an array indexed in one that is not lies in memory.
#define LOCKSTEP_UNROLL_SUMS _Pragma("GCC unroll 8")
#include "kernels/generic/all.h"
#undef LOCKSTEP_UNROLL_SUMS

}  // namespace

bool avx512_runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
constinit const Table kAvx512 = make_table();

}  // namespace lockstep::kernels

LOCKSTEP_TARGET_END

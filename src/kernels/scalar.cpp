// The base: plain C++ for any processor. 16 lanes are arrays, which compilers vectorise as they can.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "quant/half.h"

namespace lockstep::kernels {
namespace {

constexpr std::string_view kName = "scalar";
constexpr int kRowTile = 4;
constexpr int kRowTileFixed = 2;
constexpr int kRowTilePlanes = 2;
constexpr bool kRowsInTurn = false;
constexpr int kFewWideBits = 8;
constexpr int kManyTileWide = 2;    // the same where there are many rows, in 16 bits
constexpr int kManyTileNarrow = 2;  // and in 8
constexpr bool kManyWideSumsInMemory = false;
constexpr int kUnpackRows = 8;
constexpr int kPanelTile = 1;
constexpr bool kLoadsRunAhead = false;
constexpr int kNarrowBits = 8;
constexpr int kQueryTile = 1;
constexpr int kKeyParts = 4;
constexpr int kValueVectors = 4;
constexpr int kPeakSums = 2;
constexpr int kPeakDots = 2;

// 16 floats, 16 int32, 64 bytes.
struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct B {
  uint8_t v[64];
};

template <typename Result = F, typename Function>
inline Result lanes(Function function) {
  Result result;
  for (int i = 0; i < static_cast<int>(std::size(result.v)); ++i) result.v[i] = function(i);
  return result;
}

inline F set1(float x) {
  return lanes([&](int) { return x; });
}
inline F zero() { return set1(0); }
inline F load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
inline void store(float* p, F x) { std::copy_n(x.v, 16, p); }
inline F operator+(F x, F y) {
  return lanes([&](int i) { return x.v[i] + y.v[i]; });
}
inline F operator-(F x, F y) {
  return lanes([&](int i) { return x.v[i] - y.v[i]; });
}
inline F operator*(F x, F y) {
  return lanes([&](int i) { return x.v[i] * y.v[i]; });
}
inline F operator/(F x, F y) {
  return lanes([&](int i) { return x.v[i] / y.v[i]; });
}
// Not fused: the base instruction set has no such operation, and emulating it is slow.
inline F fma(F x, F y, F z) {
  return lanes([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
}
// A NaN in y comes through both.
inline F max(F x, F y) {
  return lanes([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline F min(F x, F y) {
  return lanes([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
// Of what is NaN or too large: the value that x86's conversion gives.
inline I round_to_int(F x) {
  return lanes<I>([&](int i) {
    const float rounded = std::nearbyint(x.v[i]);
    const bool fits = rounded >= -2147483648.0F && rounded < 2147483648.0F;
    return fits ? static_cast<int32_t>(rounded) : std::numeric_limits<int32_t>::min();
  });
}
// The lowest byte of each.
inline void store_bytes(int8_t* p, I x, I y) {
  for (int i = 0; i < 32; ++i)
    p[i] = static_cast<int8_t>(static_cast<uint8_t>(i < 16 ? x.v[i] : y.v[i - 16]));
}
inline F to_float(I x) {
  return lanes([&](int i) { return static_cast<float>(x.v[i]); });
}
inline F times_power(F x, F power) { return x * power; }
inline bool any_special(F) { return false; }
// x * 2^n for n in [-125, 128], in two factors: 2^128 has no float of its own.
inline F scale_by_power(F x, I n) {
  return lanes([&](int i) {
    const uint32_t bits = (static_cast<uint32_t>(n.v[i]) + 126U) << 23;
    return x.v[i] * std::bit_cast<float>(bits) * 2.0F;
  });
}
// Lanes i with first <= i < last keep x, others take y.
inline F select_range(int first, int last, F x, F y) {
  return lanes([&](int i) { return first <= i && i < last ? x.v[i] : y.v[i]; });
}
// 8 + 8, 4 + 4, 2 + 2, 1 + 1: the tree that every ISA follows.
inline float sum(F x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return x.v[0];
}
inline float largest(F x) {
  float result = x.v[0];
  for (float value : x.v) result = result > value ? result : value;
  return result;
}
// Magnitudes are compared as integers: infinity is above all numbers, and NaN above infinity.
inline float larger_magnitude(float x, float y) {
  return std::bit_cast<float>(
      std::max(std::bit_cast<int32_t>(std::fabs(x)), std::bit_cast<int32_t>(std::fabs(y))));
}
inline F larger_magnitude(F x, F y) {
  return lanes([&](int i) { return larger_magnitude(x.v[i], y.v[i]); });
}
inline float largest_magnitude(F x) {
  float result = 0;
  for (float value : x.v) result = larger_magnitude(result, value);
  return result;
}
// Minus the sums of x and of y, which wrap.
inline void minus_sums(I x, I y, int32_t* sums) {
  for (const I& integers : {x, y}) {
    uint32_t total = 0;
    for (const int32_t value : integers.v) total -= static_cast<uint32_t>(value);
    *sums++ = static_cast<int32_t>(total);
  }
}

inline F load_f16(const void* p) {
  uint16_t half[16];
  std::memcpy(half, p, sizeof(half));
  return lanes([&](int i) { return f16_value(half[i]); });
}
inline void store_f16(void* p, F x) {
  uint16_t half[16];
  for (int i = 0; i < 16; ++i) half[i] = to_f16(x.v[i]);
  std::memcpy(p, half, sizeof(half));
}
inline F load_bf16(const void* p) {
  uint16_t half[16];
  std::memcpy(half, p, sizeof(half));
  return lanes([&](int i) { return bf16_value(half[i]); });
}
// The first or second of 16 pairs.
inline F load_bf16_pair(const void* p, int i) {
  uint16_t half[32];
  std::memcpy(half, p, sizeof(half));
  return lanes([&](int lane) { return bf16_value(half[2 * lane + i]); });
}
inline F load_u8(const void* p) {
  return lanes([&](int i) { return static_cast<float>(static_cast<const uint8_t*>(p)[i]); });
}
inline F load_i8(const void* p) {
  return lanes([&](int i) { return static_cast<float>(static_cast<const int8_t*>(p)[i]); });
}

inline B load_bytes(const void* p) {
  B x;
  std::memcpy(x.v, p, sizeof(x.v));
  return x;
}
inline B operator&(B x, uint8_t mask) {
  return lanes<B>([&](int i) { return static_cast<uint8_t>(x.v[i] & mask); });
}
inline B operator|(B x, B y) {
  return lanes<B>([&](int i) { return static_cast<uint8_t>(x.v[i] | y.v[i]); });
}
// Shifts within bytes: what vector code shifts across a byte, its caller masks.
inline B operator>>(B x, int n) {
  return lanes<B>([&](int i) { return static_cast<uint8_t>(x.v[i] >> n); });
}
inline B operator<<(B x, int n) {
  return lanes<B>([&](int i) { return static_cast<uint8_t>(x.v[i] << n); });
}
inline void store_bytes(void* p, B x) { std::memcpy(p, x.v, sizeof(x.v)); }
// Byte `i` (0..3) of each of the 16 groups of four, as float.
inline F quad_column(B x, int i) {
  return lanes([&](int lane) { return static_cast<float>(x.v[4 * lane + i]); });
}
inline I int_zero() {
  return lanes<I>([](int) { return 0; });
}
// Four bytes of activations, in every lane.
inline B broadcast(const int8_t* x) {
  return lanes<B>([&](int i) { return static_cast<uint8_t>(x[i % 4]); });
}

inline I set1_int(int32_t x) {
  return lanes<I>([&](int) { return x; });
}
// Sums wrap, as those of the vector instructions do.
inline uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
inline I operator+(I x, I y) {
  return lanes<I>([&](int i) { return static_cast<int32_t>(bits(x.v[i]) + bits(y.v[i])); });
}
inline I operator-(I x, I y) {
  return lanes<I>([&](int i) { return static_cast<int32_t>(bits(x.v[i]) - bits(y.v[i])); });
}
// x * ratios[0] + y * ratios[1], all of 16 bits.
inline I join(I x, I y, const int16_t* ratios) {
  return lanes<I>([&](int i) {
    return static_cast<int32_t>(bits(x.v[i]) * bits(ratios[0]) + bits(y.v[i]) * bits(ratios[1]));
  });
}
// Pairs of 16 bits, multiplied and added to sum.
inline I add_words(I sum, B x, B y) {
  int16_t a[32], b[32];
  std::memcpy(a, x.v, sizeof(a));
  std::memcpy(b, y.v, sizeof(b));
  return lanes<I>([&](int i) {
    return static_cast<int32_t>(bits(sum.v[i]) + bits(a[2 * i] * b[2 * i]) +
                                bits(a[2 * i + 1] * b[2 * i + 1]));
  });
}
// What fits 16 bits.
inline void store_words(int16_t* p, I x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(x.v[i]);
}
inline I shift_left(I x, int n) {
  return lanes<I>([&](int i) { return static_cast<int32_t>(bits(x.v[i]) << n); });
}

// Products of unsigned codes with signed bytes, four columns at a time, summed in int32.
struct ByteProducts {
  static constexpr bool kGoesOn = true;
  static constexpr bool kChained = false;
  static constexpr bool kUnsignedDigits = false;
  static constexpr int alike(int) { return 8; }
  static constexpr int taken_off(int, int) { return 0; }
  static constexpr int kWidePlanes = 2;
  static constexpr int kVectors = 1;  // that a quad of codes becomes
  static constexpr int run(int) { return 8; }
  static constexpr int digits_at(int quad, int plane, int) { return 32 * plane + 4 * quad; }

  template <int kBits>
  static void split(B quad, B* vectors) {
    vectors[0] = quad;
  }
  static I add(I sum, B codes, B x) {
    for (int lane = 0; lane < 16; ++lane) {
      uint32_t total = static_cast<uint32_t>(sum.v[lane]);  // wraps, as vectors do
      for (int i = 0; i < 4; ++i)
        total += static_cast<uint32_t>(codes.v[4 * lane + i] * static_cast<int8_t>(x.v[i]));
      sum.v[lane] = static_cast<int32_t>(total);
    }
    return sum;
  }
  static I total(I sum) { return sum; }
  static I high_total(I sum) { return shift_left(sum, 8); }
  static void store_wide(int8_t* digits, I x, I y) {
    const auto high = [](I n) { return lanes<I>([&](int i) { return (n.v[i] + 128) >> 8; }); };
    store_bytes(digits, high(x), high(y));
    store_bytes(digits + 32, x, y);
  }
};
using WideProducts = ByteProducts;
using ManyByteProducts = ByteProducts;
using ManyWideProducts = ByteProducts;

#define LOCKSTEP_UNROLL_SUMS
#include "kernels/generic/all.h"
#undef LOCKSTEP_UNROLL_SUMS

}  // namespace

constinit const Table kScalar = make_table();

}  // namespace lockstep::kernels

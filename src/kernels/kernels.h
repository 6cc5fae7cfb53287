// The one door to code that depends on the processor: a table of coarse functions for each ISA,
// chosen once. Every function states its arithmetic; all ISAs follow it operation by operation, but that
// scalar code, without a fused multiply-add, rounds twice.
//
// Vectors are thought of as 16 lanes on every ISA (two registers on AVX2, an array in the scalar
// code), so sums are split the same way everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "quant/panel.h"

namespace lockstep::kernels {

/// 32 columns of a row of activations as 16-bit fixed point: x[k] ~ scale * n[k], |n| <= 32639, the scale a
/// power of two, so that scales of weights times it are a sum of exponents. Rows are padded with zeros up to
/// a multiple of 32.
struct Fixed16 {
  int8_t digits[64];  // as the ISA multiplies them: a high and a low plane, n = 256 * high + low, or int16;
                      // for many rows perhaps unsigned bytes, n = 256 * (high - 128) + low
  float scale;
  int32_t minus_sum[3];  // sums of the integers, negative: of the first 16, of the others, of all
  float minus_total;     // sum of the rounded values, negative
};
/// The same as 8-bit fixed point: x[k] ~ scale[k / 16] * digits[k], |digits| <= 127, the scales whole
/// multiples of a power of two, so that sums of 16 columns that fit 16 bits are joined in integers.
struct Fixed8 {
  int8_t digits[32];  // for many rows perhaps unsigned, 128 more
  float scale[2];     // unit * ratio
  float unit;
  int16_t ratio[2];      // > 0
  int32_t minus_sum[2];  // of the first 16, of the others
  float minus_total;
};

/// One product y[t, n] = sum_k x[t, k] * W[n, k] over panels of 16 rows of W, a matrix of one strip.
struct LinearArgs {
  const quant::PanelMatrix* weight = nullptr;  // [N, K]
  const std::byte* fetched = nullptr;  // what is read after it, to be fetched meanwhile; null: unknown
  int64_t rows = 0;                    // T
  bool many = false;                   // weights are unpacked once for all rows
  const float* x = nullptr;            // [T, K]; used by `linear_f32`
  const uint16_t* x_bf16 = nullptr;    // [T, K], K even by a zero; used by `linear_bf16`
  int64_t x_stride = 0;                // from row to row, in elements or blocks of 32
  // Rounded for many if they are.
  const Fixed16* x_fixed16 = nullptr;  // [T, K / 32]; used by `linear_fixed16`
  const Fixed8* x_fixed8 = nullptr;    // [T, K / 32]; used by `linear_fixed8`
  const float* x_start = nullptr;      // [T]: what `to_fixed16` or `to_fixed8` returned for a row
  bool accumulate = false;  // y already holds the sums of columns before these; not of plain weights
  float* y = nullptr;       // [T, N]
  int64_t y_stride = 0;     // in elements
};

/// Attention of some queries to some of the keys, not yet divided by the total.
struct AttentionPart {
  float* peak = nullptr;   // [queries]: largest score, -inf where no key was seen
  float* total = nullptr;  // [queries]: sum of exp(score - peak)
  float* out = nullptr;    // [queries, D]: sum of exp(score - peak) * value; undefined where no key was seen
};

/// How the elements of a tile are kept. i16: integers with a scale a key, neighbours in pairs, as products of
/// 16 bits take them.
enum class TileForm : uint8_t { f32, f16, i16 };

/// Keys of a tile.
constexpr int64_t kTileKeys = 64;

/// 64 keys and values of one KV head.
struct KvTile {
  TileForm form = TileForm::f32;
  const void* k = nullptr;         // [D, 64]: keys transposed, so that a lane is a key; i16: [D / 2, 64, 2]
  const void* v = nullptr;         // [64, v_stride]; i16: [32, v_stride, 2], a pair is two keys
  const float* k_scale = nullptr;  // [64]; i16 only
  const float* v_scale = nullptr;  // [64]; i16 only
};

/// Queries of one KV head against one tile: what the tile alone yields.
struct AttentionTileArgs : AttentionPart {
  int64_t queries = 0;             // rows of one session times query heads of the group
  int64_t head_dim = 0;            // D
  const float* q = nullptr;        // [queries, D], already scaled; not of i16
  const int16_t* q_i16 = nullptr;  // [queries, D, even by a zero], made by `to_i16`; i16 only
  const float* q_scale = nullptr;  // [queries]; i16 only
  KvTile tile;
  int64_t v_stride = 0;            // D rounded up to 16, so that loads stay inside
  const void* next = nullptr;      // keys of the tile that comes after this one, to be fetched ahead; or null
  const int32_t* first = nullptr;  // [queries]: the keys first[i] <= j < last[i] of the tile count
  const int32_t* last = nullptr;   // [queries]; no key if last[i] <= first[i]
};

/// The largest integers of tiles of i16. Of weights and values the products of a tile add up in 32 bits; a
/// weight is a power of two, so that a single key returns its value as it is.
constexpr int32_t kLargestWeight = 4096, kLargestValue = 8191;
/// Of queries and keys: so large that products of a head add up in 32 bits.
constexpr int32_t largest_key(int64_t head_dim) {
  int32_t root = 0;
  for (int32_t bit = 1 << 14; bit > 0; bit /= 2) {
    if ((root + bit) * (root + bit) <= 2147483647 / head_dim) root += bit;
  }
  return root;
}

/// Rows whose activations products keep at hand while panels pass by.
constexpr int64_t kRowsTogether = 128;

struct Table {
  std::string_view isa;

  /// Products in f32 on the weights dequantised exactly as the reference does; one accumulator an
  /// output, k ascending, fused multiply-add. Panels [begin, end).
  void (*linear_f32)(const LinearArgs& args, int64_t begin, int64_t end);
  /// Products of stored codes with fixed-point activations: integer sums within a block (fixed8: half a
  /// block), blocks in ascending k, f32 across blocks. Only for integer panel formats; fixed8 for codes of at
  /// most `narrow_bits`, beyond which it would not be faster.
  void (*linear_fixed16)(const LinearArgs& args, int64_t begin, int64_t end);
  void (*linear_fixed8)(const LinearArgs& args, int64_t begin, int64_t end);
  int narrow_bits;
  /// From so many rows on it is faster to unpack weights once for all of them (`LinearArgs::many`), for
  /// products in f32 and in fixed point: up to kRowsTogether, or never.
  int64_t many_rows;
  int64_t many_rows_fixed;
  /// Rounds one row of `columns` values to blocks of fixed point. Returns where sums with it start: 0, or NaN
  /// where a value is not finite or larger than 2^118, so that this reaches the result. For `many` rows
  /// digits may be kept in another way: the same numbers, and where not `many_fixed16` or `many_fixed8` the
  /// same bytes. Few rows take that way too with codes of more than `few_fixed16_bits`.
  float (*to_fixed16)(const float* x, int64_t columns, bool many, Fixed16* blocks);
  float (*to_fixed8)(const float* x, int64_t columns, bool many, Fixed8* blocks);
  bool many_fixed16;
  int few_fixed16_bits;
  bool many_fixed8;
  /// Whether products with weights of this format take digits kept in the way of many rows.
  bool takes_many_fixed16(DType dtype, bool many) const;
  bool takes_many_fixed8(bool many) const { return many_fixed8 && many; }
  /// Products of bf16 weights with bf16 activations, pairs of columns at a time in ascending k, summed in f32
  /// as the processor's instruction does. Null where the table has none.
  void (*linear_bf16)(const LinearArgs& args, int64_t begin, int64_t end);
  /// Rounds n values to bf16 (nearest even), and writes a zero behind an odd number. Null like linear_bf16.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* y);
  /// y = x / sqrt(mean(x^2) + eps) * weight; weight may be null. The mean sums 16 lanes.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  /// Rotates pairs (x[i], x[i + half]) by the angle whose cosine and sine are given, in place.
  void (*rotate_halves)(float* x, const float* cosine, const float* sine, int64_t half);
  /// out = gate / (1 + exp(-gate)) * up
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
  /// x += y
  void (*add)(float* x, const float* y, int64_t n);
  /// x += factor * y, the product rounded
  void (*add_scaled)(float* x, const float* y, float factor, int64_t n);
  /// y = factor * x
  void (*scale)(const float* x, float factor, int64_t n, float* y);
  /// y = x / divisor
  void (*divide)(const float* x, float divisor, int64_t n, float* y);
  /// Scores, weights and weighted values of one tile; keys and head_dim in ascending order. Of i16 scores
  /// and values are sums of integers: weights, each times its value's scale, are rounded to 16 bits for that.
  void (*attention_tile)(const AttentionTileArgs& args);
  /// Rounds n values to integers of magnitude `largest` or less, y[i] ~ x[i] / scale, and writes a zero
  /// behind an odd number. Returns the scale: NaN where a value is not finite or larger than 2^118.
  float (*to_i16)(const float* x, int64_t n, int32_t largest, int16_t* y);
  /// Merges a part into what was there before it. Parts come in ascending order of their keys; a query that
  /// saw none in the part is left alone.
  void (*attention_merge)(const AttentionPart& part, int64_t queries, int64_t head_dim,
                          const AttentionPart& into);
  /// f16 to f32 and back (round to nearest even); n elements.
  void (*f16_to_f32)(const uint16_t* x, float* y, int64_t n);
  void (*f32_to_f16)(const float* x, uint16_t* y, int64_t n);
  /// Reads n floats, a multiple of 64, once: the limit of one thread's loads. Returns the bytes read.
  int64_t (*peak_read)(const float* x, int64_t n);
  /// `rounds` rounds of independent multiply-adds in registers, as the products above use them: the
  /// arithmetic limit of one thread. Returns the operations done, a product and a sum being two.
  int64_t (*peak_f32)(int64_t rounds);
  int64_t (*peak_int8)(int64_t rounds);
  /// Of products of bf16 pairs. Null like linear_bf16.
  int64_t (*peak_bf16)(int64_t rounds);
};

/// Tables this processor can run, best first; the last is always "scalar".
std::span<const Table* const> available();
/// The table named `isa`; empty means the best. Error `invalid_argument` naming the available ones
/// for a name that is unknown or that this processor cannot run.
const Table& select(std::string_view isa = {});

}  // namespace lockstep::kernels

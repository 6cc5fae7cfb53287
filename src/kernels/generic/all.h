// The algorithms, once. Included by each ISA's file inside its target region and namespace, after
// it has defined the 16-lane types F (float), I (int32), B (64 bytes) with their operations, and its products
// of integers. No include guards against that: one file includes this once.
// clang-format off: each uses the ones before it
#include "kernels/generic/formats.h"
#include "kernels/generic/tiles.h"
#include "kernels/generic/unpacked.h"
#include "kernels/generic/linear.h"
#include "kernels/generic/fixed.h"
#include "kernels/generic/elementwise.h"
#include "kernels/generic/attention.h"
#include "kernels/generic/peak.h"
// clang-format on

constexpr Table make_table() {
  return {
      .isa = kName,
      .linear_f32 = linear_f32,
      .linear_fixed16 = linear_fixed16,
      .linear_fixed8 = linear_fixed8,
      .narrow_bits = kNarrowBits,
      .many_rows = kUnpackRows,
      .many_rows_fixed = kUnpackRows,
      .to_fixed16 = to_fixed16,
      .to_fixed8 = to_fixed8,
      .many_fixed16 = !std::is_same_v<ManyWideProducts, WideProducts>,
      .few_fixed16_bits = kFewWideBits,
      .many_fixed8 = !std::is_same_v<ManyByteProducts, ByteProducts>,
      .linear_bf16 = nullptr,
      .to_bf16 = nullptr,
      .rms_norm = rms_norm,
      .rotate_halves = rotate_halves,
      .silu_mul = silu_mul,
      .add = add,
      .add_scaled = add_scaled,
      .scale = scale,
      .divide = divide,
      .attention_tile = attention_tile,
      .to_i16 = to_i16,
      .attention_merge = attention_merge,
      .f16_to_f32 = f16_to_f32,
      .f32_to_f16 = f32_to_f16,
      .peak_read = peak_read,
      .peak_f32 = peak_f32,
      .peak_int8 = peak_int8,
      .peak_bf16 = nullptr,
  };
}

// Attention over a KV cache, by the kernels of every ISA, against fast::scaled_dot_product_attention, which
// stands against MLX's in test_fast.cpp.
#include "nn/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "lockstep/fast.h"
#include "support/fixtures.h"
#include "support/tables.h"

namespace lockstep {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Form {
  KvType type;
  double bound;  // of the NMSE
};
// Of normal numbers 16 bits lose some 1e-7, 8 bits 1e-4.
const std::vector<Form> kForms = {
    {KvType::f32, 1e-12}, {KvType::f16, 1e-6}, {KvType::i16, 5e-7}, {KvType::q8, 1e-3}};

struct Sizes {
  int64_t heads, kv_heads, dim, keys, window;
};
const std::vector<Sizes> kSizes = {{6, 2, 64, 150, 0}, {4, 1, 128, 70, 0},  {2, 2, 80, 65, 0},
                                   {3, 3, 20, 64, 0},  {9, 3, 64, 200, 37}, {2, 1, 16, 1030, 0},
                                   {2, 1, 7, 130, 0},  {2, 1, 256, 40, 0},  {6, 2, 16, 1100, 9}};

// Rows of one session, all heads of a position together.
class Attending {
 public:
  explicit Attending(const Sizes& sizes)
      : sizes_(sizes),
        q({sizes.keys, sizes.heads, sizes.dim}),
        k({sizes.keys, sizes.kv_heads, sizes.dim}),
        v(k.shape()) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (Tensor* x : {&q, &k, &v}) {
      for (float& value : x->values()) value = normal(random);
    }
    // One dimension stands out, as in models.
    for (int64_t t = 0; t < sizes.keys; ++t) k.row(t)[0] *= 4;
  }

  float scale() const { return 1.5F / std::sqrt(static_cast<float>(sizes_.dim)); }

  // In passes of `chunk` rows. -> [keys, H, D]
  Tensor run(const kernels::Table& table, KvType type, int64_t chunk) {
    KvCache cache({1, sizes_.kv_heads, sizes_.dim, {sizes_.window}}, type);
    const nn::Runtime runtime{&table, &pool_, Precision::exact};
    Taps none;
    Tensor all(q.shape());
    for (int64_t at = 0; at < sizes_.keys; at += chunk) {
      const int64_t rows = std::min(chunk, sizes_.keys - at);
      const Run run{&cache, 0, rows, at, sizes_.keys};
      const LayerCache layer{{&run, 1}, 0};
      nn::append(layer, part(k, at, rows), part(v, at, rows), runtime, none);
      const Tensor out = nn::attention(part(q, at, rows), layer, scale(), runtime, none);
      std::copy_n(out.data(), out.size(), all.row(at));
    }
    return all;
  }

  // [1, H, keys, D] as rows.
  Tensor expected() const {
    fast::Mask mask;
    mask.causal = true;
    mask.window = sizes_.window;
    const Tensor y =
        fast::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), scale(), mask);
    Tensor rows(q.shape());
    for (int64_t h = 0; h < sizes_.heads; ++h) {
      for (int64_t t = 0; t < sizes_.keys; ++t)
        std::copy_n(y.data() + (h * sizes_.keys + t) * sizes_.dim, sizes_.dim, rows.row(t) + h * sizes_.dim);
    }
    return rows;
  }

 private:
  static Tensor part(const Tensor& x, int64_t begin, int64_t rows) {
    Tensor some({rows, x.shape()[1], x.shape()[2]});
    std::copy_n(x.row(begin), some.size(), some.data());
    return some;
  }
  static View heads_first(const Tensor& x) {
    const Shape& shape = x.shape();
    return {x.data(), Shape{1, shape[1], shape[0], shape[2]},
            Shape{x.size(), shape[2], shape[1] * shape[2], 1}};
  }

  Sizes sizes_;
  Pool pool_{2};

 public:
  Tensor q;     // [keys, H, D]
  Tensor k, v;  // [keys, Hkv, D]
};

TEST(Attention, IsThatOfTheOperation) {
  for (const Sizes& sizes : kSizes) {
    Attending attending(sizes);
    const Tensor expected = attending.expected();
    for (const kernels::Table* table : test::tables()) {
      for (const auto& [type, bound] : kForms) {
        SCOPED_TRACE(std::string(table->isa) + ", " + std::string(kv_type_name(type)) + ", heads of " +
                     std::to_string(sizes.dim));
        Tensor whole = attending.run(*table, type, 256);
        EXPECT_LE(test::nmse(whole.values(), expected.values()), bound);
        const Tensor steps = attending.run(*table, type, 1);
        EXPECT_EQ(std::memcmp(whole.data(), steps.data(), static_cast<size_t>(whole.size()) * 4), 0)
            << "row by row";
        whole.data()[whole.size() / 2] += 20.0F;
        EXPECT_GT(test::nmse(whole.values(), expected.values()), bound) << "a planted error passes";
      }
    }
  }
}

// What is not a number reaches every row that sees it, and no other: not the one before it, which shares a
// pair of keys with it, nor the one that a window has let go of it.
TEST(Attention, SpecialValuesReachWhoSeesThem) {
  constexpr int64_t kWindow = 9;
  const float infinity = std::numeric_limits<float>::infinity();
  for (const int64_t window : {int64_t{0}, kWindow}) {
    for (const auto& [special, at] : {std::pair{kNaN, 70}, {kNaN, 71}, {infinity, 64}}) {
      for (int which = 0; which < 3; ++which) {
        if (special == infinity && which == 1) continue;  // such a key may have a score of -infinity
        Attending attending({2, 1, 64, 90, window});
        const Tensor before = attending.expected();
        (which == 0 ? attending.q : which == 1 ? attending.k : attending.v).row(at)[5] = special;
        for (const kernels::Table* table : test::tables()) {
          for (const KvType type : {KvType::f32, KvType::f16, KvType::i16}) {
            SCOPED_TRACE(std::string(table->isa) + ", " + std::string(kv_type_name(type)) + ", input " +
                         std::to_string(which) + " at " + std::to_string(at));
            const Tensor got = attending.run(*table, type, 33);
            for (int64_t t = 0; t < 90; ++t) {
              const bool sees = which == 0 ? t == at : t >= at && (window == 0 || t - at < window);
              const float value = got.row(t)[5];
              if (sees)
                EXPECT_FALSE(std::isfinite(value)) << "row " << t;
              else
                EXPECT_NEAR(value, before.row(t)[5], 1e-2) << "row " << t;
            }
          }
        }
      }
    }
  }
}

// Sums of integers at their largest: equal numbers everywhere.
TEST(Attention, SumsOfIntegersFit) {
  for (const int64_t dim : {1, 64, 96, 128, 256, 512}) {
    const int64_t largest = kernels::largest_key(dim);
    EXPECT_LT(largest * largest * dim, int64_t{1} << 31);
    EXPECT_TRUE((largest + 1) * (largest + 1) * dim >= int64_t{1} << 31 || largest == 32767);
    EXPECT_LT(int64_t{kernels::kLargestWeight} * kernels::kLargestValue * KvCache::kTile, int64_t{1} << 31);
    Attending attending({2, 1, dim, 64, 0});
    for (Tensor* x : {&attending.q, &attending.k, &attending.v}) std::ranges::fill(x->values(), 0.75F);
    for (const kernels::Table* table : test::tables()) {
      const Tensor got = attending.run(*table, KvType::i16, 64);
      for (const float value : got.values())
        ASSERT_NEAR(value, 0.75F, 2e-4F) << table->isa << ", heads of " << dim;
    }
  }
}

}  // namespace
}  // namespace lockstep

// Values that arithmetic on exponents could spoil: scales of weights that are 0, subnormal, the largest or
// not finite, and activations from the tiniest to those that are not finite.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "nn/linear.h"
#include "nn/precision.h"
#include "quant/half.h"
#include "quant/pack.h"
#include "support/tables.h"

namespace lockstep {
namespace {

constexpr int64_t N = 40, K = 96;  // the last panel is not full

// Weights [N, K] in Q4_0 (blocks of 32: a scale in f16 and 16 bytes of codes, 8 more than the value), the
// scale of block b of row n as given.
struct Weights {
  template <typename Scale>
  explicit Weights(const Scale& scale) {
    std::mt19937 random(5);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t b = 0; b < K / 32; ++b) {
        const uint16_t half = scale(n, b);
        uint8_t block[18];
        std::memcpy(block, &half, sizeof(half));
        for (int i = 0; i < 16; ++i) block[2 + i] = static_cast<uint8_t>(random());
        for (int i = 0; i < 32; ++i) {
          const int code = i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4;
          values.push_back(static_cast<double>(f16_value(half)) * (code - 8));
        }
        const auto* from = reinterpret_cast<const std::byte*>(block);
        bytes.insert(bytes.end(), from, from + sizeof(block));
      }
    }
    StoredTensor tensor;
    tensor.name = tensor.source = "weights";
    tensor.dtype = DType::q4_0;
    tensor.shape = {N, K};
    tensor.data = bytes;
    packed = quant::pack_tensors({&tensor, 1}, pool);
  }
  Tensor times(const Tensor& x, const kernels::Table* table, Precision precision) {
    const nn::Runtime runtime{table, &pool, precision};
    return nn::linear(x, {&runtime, nn::Role::gate, packed, {}});
  }

  Pool pool{1};
  std::vector<std::byte> bytes;
  std::vector<double> values;  // [N, K]
  std::shared_ptr<const quant::PackedWeight> packed;
};

Tensor activations(int64_t rows, float size) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  Tensor x({rows, K});
  for (float& value : x.values()) value = size * normal(random);
  return x;
}

TEST(SpecialValues, ScalesOfWeights) {
  // 0, -0, the smallest, a larger subnormal, 1, -1, the largest, infinity, NaN
  const std::vector<uint16_t> kinds = {0x0000, 0x8000, 0x0001, 0x8155, 0x3C00,
                                       0xBC00, 0x7BFF, 0x7C00, 0x7E00};
  const auto kind = [&](int64_t n) { return kinds[n % kinds.size()]; };
  Weights weights([&](int64_t n, int64_t b) { return b == n % 3 ? kind(n) : uint16_t{0x3800}; });
  for (const float size : {1.0F, 1e-20F, 1e25F}) {
    for (const int64_t T : {1, 2, 3, 20, 37}) {
      const Tensor x = activations(T, size);
      for (const kernels::Table* table : test::tables()) {
        for (const auto& [precision, bound] : {std::pair{Precision::exact, 4e-4}, {Precision::fast, 3e-2}}) {
          const Tensor y = weights.times(x, table, precision);
          for (int64_t t = 0; t < T; ++t) {
            for (int64_t n = 0; n < N; ++n) {
              const float got = y.row(t)[n];
              const auto where = [&] {
                return std::string(table->isa) + " " + std::string(precision_name(precision)) + " T " +
                       std::to_string(T) + " row " + std::to_string(t) + " output " + std::to_string(n);
              };
              if (!std::isfinite(f16_value(kind(n)))) {
                ASSERT_FALSE(std::isfinite(got)) << where();
                continue;
              }
              double expected = 0, total = 0;
              for (int64_t k = 0; k < K; ++k) {
                const double product = weights.values[n * K + k] * x.row(t)[k];
                expected += product, total += std::fabs(product);
              }
              ASSERT_NEAR(got, expected, bound * total) << where();
            }
          }
        }
      }
    }
  }
}

// What is not finite comes out as NaN, of its own row alone.
TEST(SpecialValues, ActivationsThatAreNotFinite) {
  Weights weights([](int64_t n, int64_t b) { return static_cast<uint16_t>(0x3000 + 37 * n + b); });
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float special : {infinity, -infinity, std::nanf(""), 0x1p119F}) {
    for (const int64_t T : {1, 2, 3, 20, 37}) {
      for (const int64_t column : {int64_t{0}, int64_t{40}, K - 1}) {
        const Tensor x = activations(T, 1.0F);
        Tensor spoilt = x.clone();
        spoilt.row(T / 2)[column] = special;
        for (const kernels::Table* table : test::tables()) {
          for (const Precision precision : {Precision::exact, Precision::fast}) {
            const Tensor y = weights.times(x, table, precision), z = weights.times(spoilt, table, precision);
            for (int64_t t = 0; t < T; ++t) {
              for (int64_t n = 0; n < N; ++n) {
                const bool right =
                    t == T / 2 ? std::isnan(z.row(t)[n]) : std::memcmp(y.row(t) + n, z.row(t) + n, 4) == 0;
                ASSERT_TRUE(right) << table->isa << " " << precision_name(precision) << " T " << T << " row "
                                   << t << " output " << n << " of " << special;
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace lockstep

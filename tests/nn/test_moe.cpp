// Mixtures of experts whose weights are not all stored alike.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "kernels/kernels.h"
#include "nn/mlp.h"
#include "quant/half.h"

namespace lockstep {
namespace {

constexpr int64_t kWidth = 64;  // hidden and intermediate
constexpr int kExperts = 3;

// Random weights of one element type. Scales of q8_0 are 2^-7.
std::vector<std::byte> random_weight(DType dtype, std::mt19937& random) {
  std::vector<std::byte> bytes(
      static_cast<size_t>(kWidth * kWidth / dtype_block(dtype) * dtype_block_bytes(dtype)));
  if (dtype == DType::q8_0) {
    for (std::byte& b : bytes) b = static_cast<std::byte>(random() & 0xFF);
    const uint16_t scale = to_f16(0x1p-7F);
    for (size_t block = 0; block < bytes.size(); block += 34) std::memcpy(&bytes[block], &scale, 2);
    return bytes;
  }
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < bytes.size(); i += 2) {
    uint32_t bits;
    const float value = normal(random);
    std::memcpy(&bits, &value, 4);
    const auto half = dtype == DType::f16 ? to_f16(value) : static_cast<uint16_t>(bits >> 16);
    std::memcpy(&bytes[i], &half, 2);
  }
  return bytes;
}

StoredTensor stored(DType dtype, int64_t rows, std::span<const std::byte> bytes) {
  StoredTensor tensor;
  tensor.name = tensor.source = "weight";
  tensor.dtype = dtype;
  tensor.shape = {rows, kWidth};
  tensor.data = bytes;
  return tensor;
}

TEST(SparseMoe, ExpertsMayBeStoredDifferently) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const DType types[kExperts] = {DType::q8_0, DType::f16, DType::bf16};
  Pool pool(2);
  Tensor x({9, kWidth}), routes({kExperts, kWidth});
  for (float& value : x.values()) value = normal(random);
  for (float& value : routes.values()) value = normal(random);
  const StoredTensor router = stored(DType::f32, kExperts, std::as_bytes(routes.values()));
  for (int first = 0; first < kExperts; ++first) {
    std::vector<std::vector<std::byte>> bytes;
    std::vector<StoredTensor> tensors;
    for (int e = 0; e < kExperts; ++e) bytes.push_back(random_weight(types[(e + first) % kExperts], random));
    for (int e = 0; e < kExperts; ++e)
      tensors.push_back(stored(types[(e + first) % kExperts], kWidth, bytes[static_cast<size_t>(e)]));
    const auto weight = quant::pack_tensors(tensors, pool);
    const auto gate = quant::pack_tensors({&router, 1}, pool);
    for (const kernels::Table* table : kernels::available()) {
      Tensor truth;
      for (const Precision precision : {Precision::f32, Precision::exact, Precision::fast}) {
        const nn::Runtime runtime{table, &pool, precision};
        Taps none;
        Tensor out = nn::sparse_moe(x, {&runtime, nn::Role::router, gate, {}},
                                    {&runtime, weight, weight, weight}, 2, 0, none);
        if (truth.empty()) truth = out.clone();
        double error = 0, size = 0;
        for (size_t i = 0; i < truth.values().size(); ++i) {
          error += std::pow(out.values()[i] - truth.values()[i], 2);
          size += std::pow(truth.values()[i], 2);
        }
        EXPECT_LE(error, (precision == Precision::fast ? 1e-3 : 1e-7) * size)
            << table->isa << " " << precision_name(precision) << ", expert 0 is " << dtype_name(types[first]);
      }
    }
  }
}

}  // namespace
}  // namespace lockstep

// The case that started the project: RoPE of one token on many heads. In the bug, [1, 4, 1, 8] was
// reshaped to [4, 1, 8], and every head but the first was lost. Here both give the same table.
// rope_multihead.py prints what mlx gives, in the same format.
#include <array>
#include <cstdint>
#include <cstdio>

#include "lockstep/fast.h"

using lockstep::Shape;
using lockstep::Tensor;

namespace {

constexpr int64_t kHeads = 4;
constexpr int64_t kWidth = 8;
constexpr std::array<float, kHeads> kFactors = {1, -1, 10, -10};  // head h = factor * head 0

Tensor rope(const Tensor& x) {
  return lockstep::fast::rope(x, kWidth, /*traditional=*/false, /*base=*/10000.0F, /*scale=*/1.0F,
                              /*offset=*/10);
}

// [batch, heads, length, width], every row of a head alike.
Tensor heads(int64_t batch, int64_t length) {
  Tensor x(Shape{batch, kHeads, length, kWidth});
  float* out = x.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (float factor : kFactors) {
      for (int64_t l = 0; l < length; ++l) {
        for (int64_t d = 0; d < kWidth; ++d) *out++ = factor * static_cast<float>(d + 1) / 10;
      }
    }
  }
  return x;
}

// Whether the first position of every head, in every batch, is the one of the table.
bool same(const Tensor& y, int64_t batch, int64_t length, const Tensor& table) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const float* row = y.data() + (b * kHeads + h) * length * kWidth;
      for (int64_t d = 0; d < kWidth; ++d) {
        if (row[d] != table.data()[h * kWidth + d]) return false;
      }
    }
  }
  return true;
}

bool report(const Tensor& y, bool is_same) {
  std::printf("%s: %s\n", y.shape().str().c_str(), is_same ? "same" : "different");
  return is_same;
}

}  // namespace

int main() {
  const Tensor table = rope(heads(1, 1));
  std::printf("head  first three values of %s after RoPE\n", table.shape().str().c_str());
  for (int64_t h = 0; h < kHeads; ++h) {
    const float* row = table.data() + h * kWidth;
    std::printf("%4d  %.6g %.6g %.6g\n", static_cast<int>(h), row[0], row[1], row[2]);
  }
  const Tensor collapsed = rope(heads(1, 1).reshaped({kHeads, 1, kWidth}));
  const Tensor batch = rope(heads(2, 3));
  bool good = report(collapsed, same(collapsed, 1, 1, table));
  good = report(batch, same(batch, 2, 3, table)) && good;
  return good ? 0 : 1;
}

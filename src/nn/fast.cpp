// RoPE and the norms of fast.h, written to be read: every leading index is walked over its own
// stride, and nothing is concluded from how many rows there are.
#include "lockstep/fast.h"

#include <array>
#include <cmath>
#include <vector>

#include "tensor/fail.h"

namespace lockstep::fast {
namespace {

using Index = std::array<int64_t, Shape::kMaxRank>;

// Calls visit(index, row) for every row of the last axis, in row-major order of the other axes.
template <typename Visit>
void for_each_row(const View& x, Visit visit) {
  const int axes = x.shape.rank() - 1;
  int64_t rows = 1;
  for (int axis = 0; axis < axes; ++axis) rows *= x.shape[axis];
  Index index{};
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.data;
    for (int axis = 0; axis < axes; ++axis) row += index[axis] * x.strides[axis];
    visit(index, row);
    for (int axis = axes - 1; axis >= 0 && ++index[axis] == x.shape[axis]; --axis) index[axis] = 0;
  }
}

void check_rank(const char* op, const View& x, int rank) {
  if (x.shape.rank() < rank) {
    fail(ErrorCode::invalid_argument, "[{}] x: expected rank {} or more, got shape {}", op, rank,
         x.shape.str());
  }
  if (x.strides.rank() != x.shape.rank()) {
    fail(ErrorCode::invalid_argument, "[{}] x: expected one stride per axis of {}, got {}", op, x.shape.str(),
         x.strides.str());
  }
}

// weight or bias: a value for each of the last axis, or none at all.
void check_width(const char* op, const char* name, std::span<const float> values, const View& x) {
  if (!values.empty() && static_cast<int64_t>(values.size()) != x.shape[-1]) {
    fail(ErrorCode::invalid_argument, "[{}] {}: expected {} values or none for x {}, got {}", op, name,
         x.shape[-1], x.shape.str(), values.size());
  }
}

void check_rope(const View& x, int64_t dims, std::optional<float> base, const Offset& offset,
                std::span<const float> freqs) {
  const char* op = "fast::rope";
  check_rank(op, x, 2);
  if (dims < 2 || dims > x.shape[-1] || dims % 2 != 0) {
    fail(ErrorCode::invalid_argument, "[{}] dims: expected an even number from 2 to {}, got {}", op,
         x.shape[-1], dims);
  }
  if (base.has_value() != freqs.empty()) {
    fail(ErrorCode::invalid_argument, "[{}] base: expected either base or freqs, got {}", op,
         base ? "both" : "neither");
  }
  if (base && !(*base > 0 && std::isfinite(*base))) {
    fail(ErrorCode::invalid_argument, "[{}] base: expected a positive number, got {}", op, *base);
  }
  if (!freqs.empty() && static_cast<int64_t>(freqs.size()) != dims / 2) {
    fail(ErrorCode::invalid_argument, "[{}] freqs: expected dims / 2 = {} values, got {}", op, dims / 2,
         freqs.size());
  }
  const auto* offsets = std::get_if<std::span<const int32_t>>(&offset);
  if (offsets == nullptr) return;
  if (x.shape.rank() == 2) {
    fail(ErrorCode::invalid_argument,
         "[{}] offset: expected one number for x {}, which has no batch axis, got {}", op, x.shape.str(),
         offsets->size());
  }
  if (static_cast<int64_t>(offsets->size()) != x.shape[0]) {
    fail(ErrorCode::invalid_argument,
         "[{}] offset: expected {} values, one per index of axis 0 of "
         "{}, got {}",
         op, x.shape[0], x.shape.str(), offsets->size());
  }
}

// Radians per position. Each operation rounds to f32 because transformers' do: at position 30000
// angles of exact frequencies would be up to 0.002 away from theirs.
std::vector<float> inverse_frequencies(int64_t dims, std::optional<float> base,
                                       std::span<const float> freqs) {
  std::vector<float> inverse(static_cast<size_t>(dims / 2));
  for (size_t i = 0; i < inverse.size(); ++i) {
    if (base) {
      const float exponent = static_cast<float>(2 * i) / static_cast<float>(dims);
      inverse[i] = 1.0F / static_cast<float>(std::pow(static_cast<double>(*base), exponent));
    } else {
      inverse[i] = 1.0F / freqs[i];
    }
  }
  return inverse;
}

}  // namespace

Tensor rope(const View& x, int64_t dims, bool traditional, std::optional<float> base, float scale,
            const Offset& offset, std::span<const float> freqs) {
  check_rope(x, dims, base, offset, freqs);
  const std::vector<float> inverse = inverse_frequencies(dims, base, freqs);
  const int64_t half = dims / 2;
  const int64_t width = x.shape[-1];
  const int64_t step = x.strides[-1];
  const int position_axis = x.shape.rank() - 2;
  const auto* offsets = std::get_if<std::span<const int32_t>>(&offset);
  Tensor result(x.shape);
  float* out = result.data();
  for_each_row(x, [&](const Index& index, const float* row) {
    const int64_t first =
        offsets != nullptr ? (*offsets)[static_cast<size_t>(index[0])] : std::get<int64_t>(offset);
    const float position = scale * static_cast<float>(first + index[position_axis]);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * inverse[static_cast<size_t>(i)];
      const auto cosine = static_cast<float>(std::cos(angle));
      const auto sine = static_cast<float>(std::sin(angle));
      const int64_t at_a = traditional ? 2 * i : i;
      const int64_t at_b = traditional ? 2 * i + 1 : i + half;
      const float a = row[at_a * step];
      const float b = row[at_b * step];
      out[at_a] = a * cosine - b * sine;
      out[at_b] = b * cosine + a * sine;
    }
    for (int64_t d = dims; d < width; ++d) out[d] = row[d * step];
    out += width;
  });
  return result;
}

Tensor rms_norm(const View& x, std::span<const float> weight, float eps) {
  check_rank("fast::rms_norm", x, 1);
  check_width("fast::rms_norm", "weight", weight, x);
  const int64_t width = x.shape[-1];
  const int64_t step = x.strides[-1];
  Tensor result(x.shape);
  float* out = result.data();
  for_each_row(x, [&](const Index&, const float* row) {
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double value = row[d * step];
      squares += value * value;
    }
    const double root = std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t d = 0; d < width; ++d) {
      const double unit = row[d * step] / root;
      out[d] = static_cast<float>(weight.empty() ? unit : unit * weight[static_cast<size_t>(d)]);
    }
    out += width;
  });
  return result;
}

Tensor layer_norm(const View& x, std::span<const float> weight, std::span<const float> bias, float eps) {
  check_rank("fast::layer_norm", x, 1);
  check_width("fast::layer_norm", "weight", weight, x);
  check_width("fast::layer_norm", "bias", bias, x);
  const int64_t width = x.shape[-1];
  const int64_t step = x.strides[-1];
  const auto count = static_cast<double>(width);
  Tensor result(x.shape);
  float* out = result.data();
  for_each_row(x, [&](const Index&, const float* row) {
    double sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += row[d * step];
    const double mean = sum / count;
    // A second pass over the deviations: E[x^2] - mean^2 cancels where the mean is large.
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double deviation = row[d * step] - mean;
      squares += deviation * deviation;
    }
    const double root = std::sqrt(squares / count + eps);
    for (int64_t d = 0; d < width; ++d) {
      double value = (row[d * step] - mean) / root;
      if (!weight.empty()) value *= weight[static_cast<size_t>(d)];
      if (!bias.empty()) value += bias[static_cast<size_t>(d)];
      out[d] = static_cast<float>(value);
    }
    out += width;
  });
  return result;
}

}  // namespace lockstep::fast

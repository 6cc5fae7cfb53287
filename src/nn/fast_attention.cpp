// scaled_dot_product_attention of fast.h: one query row at a time, all of its scores in f64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lockstep/fast.h"
#include "tensor/fail.h"

namespace lockstep::fast {
namespace {

constexpr const char* kOp = "fast::scaled_dot_product_attention";
constexpr double kUnseen = -std::numeric_limits<double>::infinity();

void check_shapes(const View& q, const View& k, const View& v, std::span<const float> sinks) {
  struct Named {
    const char* name;
    const View& view;
  };
  for (const auto& [name, view] : {Named{"q", q}, Named{"k", k}, Named{"v", v}}) {
    if (view.shape.rank() != 4 || view.strides.rank() != 4) {
      fail(ErrorCode::invalid_argument, "[{}] {}: expected 4 axes, got shape {} and strides {}", kOp, name,
           view.shape.str(), view.strides.str());
    }
  }
  const int64_t kv_heads = k.shape[1];
  if (kv_heads < 1 || q.shape[1] % kv_heads != 0) {
    fail(ErrorCode::invalid_argument, "[{}] k: expected KV heads that divide the {} of q, got {}", kOp,
         q.shape[1], kv_heads);
  }
  const Shape k_expected{q.shape[0], kv_heads, k.shape[2], q.shape[3]};
  if (!(k.shape == k_expected)) {
    fail(ErrorCode::invalid_argument, "[{}] k: expected shape {} for q {}, got {}", kOp, k_expected.str(),
         q.shape.str(), k.shape.str());
  }
  const Shape v_expected{q.shape[0], kv_heads, k.shape[2], v.shape[3]};
  if (!(v.shape == v_expected)) {
    fail(ErrorCode::invalid_argument, "[{}] v: expected shape {} for k {}, got {}", kOp, v_expected.str(),
         k.shape.str(), v.shape.str());
  }
  if (!sinks.empty() && static_cast<int64_t>(sinks.size()) != q.shape[1]) {
    fail(ErrorCode::invalid_argument,
         "[{}] sinks: expected {} values, one per head, or none, "
         "got {}",
         kOp, q.shape[1], sinks.size());
  }
}

// Strides with which a mask is read at [b, h, i, j]: 0 along the axes that it lacks or has once.
Shape broadcast_strides(const char* name, const Shape& shape, const Shape& strides, const Shape& scores) {
  Shape result{0, 0, 0, 0};
  bool fits = shape.rank() <= 4 && strides.rank() == shape.rank();
  for (int axis = -1; fits && axis >= -shape.rank(); --axis) {
    if (shape[axis] != 1) result[axis] = strides[axis];
    fits = shape[axis] == 1 || shape[axis] == scores[axis];
  }
  if (!fits) {
    fail(ErrorCode::invalid_argument, "[{}] {}: expected a shape that broadcasts to {}, got {}", kOp, name,
         scores.str(), shape.str());
  }
  return result;
}

// A Mask made ready for scores [B, H, L, Lk].
class Visibility {
 public:
  Visibility(const Mask& mask, const Shape& scores)
      : mask_(mask),
        boolean_(mask.boolean_shape.rank() > 0 || !mask.boolean.empty()),
        last_offset_(scores[3] - scores[2]) {
    if (mask.window < 0) {
      fail(ErrorCode::invalid_argument, "[{}] window: expected 0 for none or more, got {}", kOp, mask.window);
    }
    if (mask.additive != nullptr) {
      additive_strides_ =
          broadcast_strides("additive mask", mask.additive->shape, mask.additive->strides, scores);
    }
    if (!boolean_) return;
    const View dense(nullptr, mask.boolean_shape);
    boolean_strides_ = broadcast_strides("boolean mask", dense.shape, dense.strides, scores);
    if (static_cast<int64_t>(mask.boolean.size()) != mask.boolean_shape.size()) {
      fail(ErrorCode::invalid_argument, "[{}] boolean mask: expected {} values for shape {}, got {}", kOp,
           mask.boolean_shape.size(), mask.boolean_shape.str(), mask.boolean.size());
    }
  }

  // What is added to the score of query i and key j; kUnseen if the query does not see the key.
  double bias(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t last = i + last_offset_;
    if (mask_.causal && j > last) return kUnseen;
    if (mask_.window > 0 && last - j >= mask_.window) return kUnseen;
    const auto at = [&](const Shape& strides) {
      return b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
    };
    if (boolean_ && mask_.boolean[static_cast<size_t>(at(boolean_strides_))] == 0) return kUnseen;
    return mask_.additive != nullptr ? mask_.additive->data[at(additive_strides_)] : 0.0;
  }

 private:
  const Mask& mask_;
  bool boolean_;
  int64_t last_offset_;  // the newest key that query i sees is i + this
  Shape additive_strides_, boolean_strides_;
};

// [rows, width] of one head.
View head(const View& x, int64_t b, int64_t h) {
  return {x.data + b * x.strides[0] + h * x.strides[1], Shape{x.shape[2], x.shape[3]},
          Shape{x.strides[2], x.strides[3]}};
}

double dot(const View& a, int64_t i, const View& b, int64_t j) {
  const float* x = a.data + i * a.strides[0];
  const float* y = b.data + j * b.strides[0];
  double sum = 0;
  for (int64_t d = 0; d < a.shape[1]; ++d) {
    sum += static_cast<double>(x[d * a.strides[1]]) * y[d * b.strides[1]];
  }
  return sum;
}

// Scores to weights, in place. All 0 if neither a key nor a sink is seen.
void softmax(std::vector<double>& scores, double sink) {
  double peak = sink;
  for (double score : scores) peak = std::max(peak, score);
  if (peak == kUnseen) peak = 0;  // -inf - -inf would be NaN
  double total = std::exp(sink - peak);
  for (double& score : scores) {
    score = std::exp(score - peak);
    total += score;
  }
  if (total == 0) return;
  for (double& score : scores) score /= total;
}

void weighted_sum(const std::vector<double>& weights, const View& values, float* out) {
  for (int64_t d = 0; d < values.shape[1]; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < values.shape[0]; ++j) {
      const double weight = weights[static_cast<size_t>(j)];
      // A key that is not seen may have any value, NaN included: an unwritten slot of a cache.
      if (weight != 0) sum += weight * values.data[j * values.strides[0] + d * values.strides[1]];
    }
    out[d] = static_cast<float>(sum);
  }
}

}  // namespace

Tensor scaled_dot_product_attention(const View& q, const View& k, const View& v, float scale,
                                    const Mask& mask, std::span<const float> sinks) {
  check_shapes(q, k, v, sinks);
  const Shape scores{q.shape[0], q.shape[1], q.shape[2], k.shape[2]};
  const Visibility visibility(mask, scores);
  const int64_t group = q.shape[1] / k.shape[1];
  Tensor result(Shape{q.shape[0], q.shape[1], q.shape[2], v.shape[3]});
  float* out = result.data();
  std::vector<double> weights(static_cast<size_t>(k.shape[2]));
  for (int64_t b = 0; b < scores[0]; ++b) {
    for (int64_t h = 0; h < scores[1]; ++h) {
      const View queries = head(q, b, h);
      const View keys = head(k, b, h / group);
      const View values = head(v, b, h / group);
      const double sink = sinks.empty() ? kUnseen : sinks[static_cast<size_t>(h)];
      for (int64_t i = 0; i < scores[2]; ++i, out += v.shape[3]) {
        for (int64_t j = 0; j < scores[3]; ++j) {
          const double bias = visibility.bias(b, h, i, j);
          weights[static_cast<size_t>(j)] =
              bias == kUnseen ? kUnseen : scale * dot(queries, i, keys, j) + bias;
        }
        softmax(weights, sink);
        weighted_sum(weights, values, out);
      }
    }
  }
  return result;
}

}  // namespace lockstep::fast

#include "nn/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "tensor/fail.h"

namespace lockstep::nn {
namespace {

// base^(-2i / dims), rounded to f32 after each operation, as torch does.
std::vector<float> frequencies(float base, int64_t dims) {
  std::vector<float> inverse(static_cast<size_t>(dims / 2));
  for (size_t i = 0; i < inverse.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dims);
    inverse[i] = 1.0F / static_cast<float>(std::pow(static_cast<double>(base), exponent));
  }
  return inverse;
}

// A number that must be positive: it divides, or a logarithm is taken of it.
double positive(const Config& config, std::string_view key, std::optional<double> fallback = {}) {
  const double value = config.number(key, fallback);
  if (!(value > 0) || !std::isfinite(value)) {
    fail(ErrorCode::format, "[{}] {}: expected a positive number, got {}", config.where(), key, value);
  }
  return value;
}

// Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
void stretch_llama3(const Config& scaling, std::vector<float>& inverse) {
  const auto factor = static_cast<float>(positive(scaling, "factor"));
  const auto low = static_cast<float>(positive(scaling, "low_freq_factor"));
  const auto high = static_cast<float>(positive(scaling, "high_freq_factor"));
  const auto trained = static_cast<float>(positive(scaling, "original_max_position_embeddings"));
  for (float& frequency : inverse) {
    const float wavelength = 2 * std::numbers::pi_v<float> / frequency;
    if (wavelength < trained / high) continue;
    if (wavelength > trained / low) {
      frequency /= factor;
    } else {
      const float smooth = (trained / wavelength - low) / (high - low);
      frequency = (1 - smooth) * frequency / factor + smooth * frequency;
    }
  }
}

double yarn_scale(double factor, double weight) {
  return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

// YaRN (Peng et al. 2023): a ramp over the dimensions between kept and stretched frequencies.
// Returns the attention factor.
float stretch_yarn(const Config& config, const Config& scaling, double base, int64_t dims,
                   std::vector<float>& inverse) {
  const double trained = positive(scaling, "original_max_position_embeddings");
  const double factor = scaling.has("factor") ? positive(scaling, "factor")
                                              : positive(config, "max_position_embeddings") / trained;
  scaling.ignore("factor");
  const double beta_fast = positive(scaling, "beta_fast", 32.0);
  const double beta_slow = positive(scaling, "beta_slow", 1.0);
  const auto dimension_of = [&](double rotations) {
    return static_cast<double>(dims) * std::log(trained / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(base));
  };
  double low = dimension_of(beta_fast);
  double high = dimension_of(beta_slow);
  if (scaling.boolean("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dims - 1));
  if (low == high) high += 0.001;  // as the reference does, against a division by zero
  const auto stretch = static_cast<float>(factor);
  for (size_t i = 0; i < inverse.size(); ++i) {
    const float place = (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
    const float kept = 1 - std::clamp(place, 0.0F, 1.0F);
    const float divisor = static_cast<float>(
        std::pow(base, static_cast<double>(static_cast<float>(2 * i) / static_cast<float>(dims))));
    inverse[i] = 1.0F / (stretch * divisor) * (1 - kept) + 1.0F / divisor * kept;
  }
  const double mscale = scaling.number("mscale", 0.0);
  const double mscale_all_dim = scaling.number("mscale_all_dim", 0.0);
  const double derived = mscale != 0 && mscale_all_dim != 0
                             ? yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
                             : yarn_scale(factor, 1);
  return static_cast<float>(scaling.number("attention_factor", derived));
}

// Where a config says how its frequencies are stretched; nullptr: they are not.
const Config* scaling_of(const Config& config) {
  const Config* scaling = config.object("rope_parameters");
  return scaling != nullptr ? scaling : config.object("rope_scaling");
}

}  // namespace

double rope_theta(const Config& config, double fallback) {
  const double base = positive(config, "rope_theta", fallback);
  const Config* scaling = scaling_of(config);
  return scaling == nullptr ? base : positive(*scaling, "rope_theta", base);
}

RoPE::RoPE(const Config& config, int64_t head_dim, double default_theta) {
  const Config* scaling = scaling_of(config);
  const double base = rope_theta(config, default_theta);
  double partial = positive(config, "partial_rotary_factor", 1.0);
  std::string type = "default";
  if (scaling != nullptr) {
    partial = positive(*scaling, "partial_rotary_factor", partial);
    type = scaling->text("rope_type", scaling->text("type", "default"));
    scaling->ignore("type");
  }
  const auto dims = static_cast<int64_t>(static_cast<double>(head_dim) * partial);
  if (dims < 2 || dims % 2 != 0 || dims > head_dim) {
    fail(ErrorCode::unsupported,
         "[{}] rotary dimensions: expected an even number from 2 to the head's {}, got {}", config.where(),
         head_dim, dims);
  }
  base_ = static_cast<float>(base);
  inverse_ = frequencies(base_, dims);
  if (type == "linear") {
    const auto factor = static_cast<float>(positive(*scaling, "factor"));
    for (float& frequency : inverse_) frequency /= factor;
  } else if (type == "dynamic") {
    dynamic_.factor = static_cast<float>(positive(*scaling, "factor"));
    dynamic_.trained = static_cast<float>(positive(config, "max_position_embeddings"));
    scaling->ignore("original_max_position_embeddings");
  } else if (type == "llama3") {
    stretch_llama3(*scaling, inverse_);
  } else if (type == "yarn") {
    attention_factor_ = stretch_yarn(config, *scaling, base, dims, inverse_);
  } else if (type != "default") {
    fail(ErrorCode::unsupported, "[{}] rope_type: expected default, linear, dynamic, llama3 or yarn, got {}",
         config.where(), type);
  }
}

void RoPE::divide(std::span<const float> divisors) {
  for (size_t i = 0; i < inverse_.size(); ++i) inverse_[i] /= divisors[i];
}

std::vector<float> RoPE::stretched(int64_t context) const {
  const auto length = static_cast<float>(context);
  if (dynamic_.trained == 0 || length <= dynamic_.trained) return inverse_;
  const auto dims = static_cast<double>(2 * inverse_.size());
  const float growth = dynamic_.factor * length / dynamic_.trained - (dynamic_.factor - 1);
  const auto power = static_cast<float>(std::pow(static_cast<double>(growth), dims / (dims - 2)));
  return frequencies(base_ * power, static_cast<int64_t>(dims));
}

RotaryTable RoPE::table(const Batch& batch, const Runtime& runtime) const {
  RotaryTable table{Tensor({batch.rows(), pairs()}), Tensor({batch.rows(), pairs()})};
  for (const Run& run : batch.runs) {
    const std::vector<float> inverse = stretched(run.context);
    constexpr int64_t kWork = 100;  // a sine and a cosine
    runtime.for_rows(run.rows, kWork * pairs(), [&](int64_t begin, int64_t end) {
      for (int64_t t = run.first_row + begin; t < run.first_row + end; ++t) {
        const auto position = static_cast<float>(batch.positions[t]);
        for (int64_t i = 0; i < pairs(); ++i) {
          const double angle = position * inverse[i];
          table.cosine.row(t)[i] = static_cast<float>(std::cos(angle)) * attention_factor_;
          table.sine.row(t)[i] = static_cast<float>(std::sin(angle)) * attention_factor_;
        }
      }
    });
  }
  return table;
}

void rotate(Tensor& x, const RotaryTable& table, const Runtime& runtime) {
  const int64_t heads = x.shape()[1];
  const int64_t dim = x.shape()[2];
  const int64_t half = table.cosine.shape()[1];
  runtime.for_rows(x.shape()[0], heads * dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        runtime.kernels->rotate_halves(x.row(t) + h * dim, table.cosine.row(t), table.sine.row(t), half);
      }
    }
  });
}

}  // namespace lockstep::nn

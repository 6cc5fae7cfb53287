// Rotary position embedding (Su et al. 2021) in the split-half form, and the ways of stretching its
// frequencies to longer contexts. Formulas: transformers' modeling_rope_utils.py.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "generate/batch.h"
#include "lockstep/checkpoint.h"
#include "lockstep/tensor.h"
#include "nn/runtime.h"

namespace lockstep::nn {

/// The base of the frequencies: `rope_theta` of `rope_parameters` or `rope_scaling`, or of the config itself.
double rope_theta(const Config& config, double fallback);

/// Cosines and sines for the rows of a batch: computed once a pass, used by every layer and head.
struct RotaryTable {
  Tensor cosine, sine;  // [T, dims / 2], times the attention factor
};

class RoPE {
 public:
  /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`, from a config. Error `unsupported`
  /// for a type other than default, linear, dynamic, llama3 and yarn.
  RoPE(const Config& config, int64_t head_dim, double default_theta);

  /// Divides the inverse frequencies, one divisor each: how a GGUF stores Llama 3's stretching.
  void divide(std::span<const float> divisors);

  /// cos and sin of position * inverse frequency; the product is taken in f32, and both are rounded
  /// once. `dynamic` stretches each session by the context it has declared.
  RotaryTable table(const Batch& batch, const Runtime& runtime) const;

  /// Pairs of dimensions that are rotated.
  int64_t pairs() const { return static_cast<int64_t>(inverse_.size()); }
  float attention_factor() const { return attention_factor_; }

 private:
  /// NTK-aware stretching: the base grows with the context.
  struct Dynamic {
    float factor = 1;
    float trained = 0;  // positions the model was trained on; 0: not dynamic
  };
  std::vector<float> stretched(int64_t context) const;

  float base_ = 0;
  std::vector<float> inverse_;  // [dims / 2]
  float attention_factor_ = 1;
  Dynamic dynamic_;
};

/// Rotates every head of every row by the row's own angles. x: [T, heads, D]; dimensions beyond
/// those of the table are left alone.
void rotate(Tensor& x, const RotaryTable& table, const Runtime& runtime);

}  // namespace lockstep::nn

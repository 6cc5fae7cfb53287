#include "models/sizes.h"

#include <algorithm>
#include <cmath>

#include "nn/rope.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

// Sizes come from a file: bounded, so that products of two of them cannot overflow.
int64_t read_size(const Config& config, std::string_view key, std::optional<int64_t> fallback = {},
                  int64_t most = int64_t{1} << 30) {
  const int64_t value = config.integer(key, fallback);
  if (value < 1 || value > most)
    fail(ErrorCode::format, "[{}] {}: expected 1 to {}, got {}", config.where(), key, most, value);
  return value;
}

}  // namespace

TransformerSizes read_sizes(const Config& config, const SizeDefaults& defaults) {
  TransformerSizes sizes;
  constexpr int64_t kMostLayers = 65536;  // each has a place in memory before its weights are looked for
  sizes.layers = read_size(config, "num_hidden_layers", {}, kMostLayers);
  sizes.hidden = read_size(config, "hidden_size");
  sizes.heads = read_size(config, "num_attention_heads");
  sizes.kv_heads = read_size(config, "num_key_value_heads", defaults.kv_heads.value_or(sizes.heads));
  sizes.head_dim = read_size(config, "head_dim", std::max<int64_t>(1, sizes.hidden / sizes.heads));
  sizes.intermediate = read_size(config, "intermediate_size");
  sizes.vocab = read_size(config, "vocab_size");
  sizes.eps = static_cast<float>(config.number("rms_norm_eps", defaults.eps));
  if (!(sizes.eps >= 0) || !std::isfinite(sizes.eps)) {
    fail(ErrorCode::format, "[{}] rms_norm_eps: expected 0 or more, got {}", config.where(), sizes.eps);
  }
  if (sizes.heads % sizes.kv_heads != 0) {
    fail(ErrorCode::format, "[{}] num_key_value_heads: expected a divisor of the {} query heads, got {}",
         config.where(), sizes.heads, sizes.kv_heads);
  }
  sizes.rope_theta = nn::rope_theta(config, defaults.rope_theta);
  sizes.windows.assign(static_cast<size_t>(sizes.layers), 0);
  return sizes;
}

int64_t read_window(const Config& config, int64_t fallback) {
  const int64_t window = config.integer("sliding_window", config.is_null("sliding_window") ? 0 : fallback);
  if (window < 0) {
    fail(ErrorCode::format, "[{}] sliding_window: expected 0 or more, got {}", config.where(), window);
  }
  return window;
}

}  // namespace lockstep

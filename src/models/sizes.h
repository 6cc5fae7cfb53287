// The sizes of a decoder-only transformer, read from the config's keys with the defaults of transformers'
// config class.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "lockstep/checkpoint.h"
#include "lockstep/model.h"

namespace lockstep {

struct TransformerSizes {
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t heads = 0;     // H
  int64_t kv_heads = 0;  // Hkv
  int64_t head_dim = 0;  // D
  int64_t intermediate = 0;
  int64_t vocab = 0;
  int64_t experts = 0;            // E; 0: none
  int64_t experts_per_token = 0;  // k
  float eps = 0;
  double rope_theta = 0;
  std::vector<int64_t> windows;  // [layers]: keys that a query sees, itself included; 0: all

  int64_t q_width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
  CacheShape cache_shape() const { return {layers, kv_heads, head_dim, windows}; }
};

/// Defaults that differ between config classes. No value: the number of query heads.
struct SizeDefaults {
  std::optional<int64_t> kv_heads;
  double eps = 1e-6;
  double rope_theta = 10000.0;
};
/// All but experts; no layer has a window. Error `format` if the sizes do not fit together.
TransformerSizes read_sizes(const Config& config, const SizeDefaults& defaults);

/// `sliding_window`: keys that a query sees, itself included; 0: all, which null says too.
int64_t read_window(const Config& config, int64_t fallback);

}  // namespace lockstep

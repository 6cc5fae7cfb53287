// The rows of one forward pass. A row is one token of one session; its session and position are
// always given, never inferred from a shape.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/kv_cache.h"

namespace lockstep {

/// Consecutive rows that belong to one session, at consecutive positions.
struct Run {
  KvCache* cache = nullptr;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_position = 0;
  int64_t context = 0;  ///< most tokens the session has declared to hold
};

/// One layer's caches, seen by the rows of a batch.
struct LayerCache {
  std::span<const Run> runs;
  int64_t layer = 0;
};

struct Batch {
  std::vector<int32_t> ids;          // [T]
  std::vector<int32_t> positions;    // [T]
  std::vector<int32_t> logits_rows;  // rows whose logits are wanted, ascending
  std::vector<Run> runs;             // cover all rows, in order

  int64_t rows() const { return static_cast<int64_t>(ids.size()); }
  LayerCache cache(int layer) const { return {runs, layer}; }

  /// Adds `tokens` of one session, from `position` on. Logits are wanted of every row or of the last.
  void add(KvCache& cache, std::span<const int32_t> tokens, int64_t position, int64_t context,
           bool every_row) {
    runs.push_back({&cache, rows(), static_cast<int64_t>(tokens.size()), position, context});
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (every_row || i + 1 == tokens.size()) logits_rows.push_back(static_cast<int32_t>(rows()));
      positions.push_back(static_cast<int32_t>(position + static_cast<int64_t>(i)));
      ids.push_back(tokens[i]);
    }
  }
};

}  // namespace lockstep

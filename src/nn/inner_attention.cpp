#include "nn/inner_attention.h"

#include <algorithm>
#include <cmath>

namespace lockstep::nn {
namespace {

constexpr int64_t kTile = KvCache::kTile;

// Keys and values of one KV head, by absolute position. What the cache has let go of stays 0.
struct HeadRows {
  HeadRows(const KvCache& cache, int64_t layer, int64_t head, int64_t oldest, int64_t length, int64_t dim,
           const Runtime& runtime)
      : k(Tensor::zeros({length, dim})), v(Tensor::zeros({length, dim})) {
    Tensor k_tile({dim, kTile});                 // [D, 64]
    Tensor v_tile({kTile, cache.padded_dim()});  // [64, padded]
    for (int64_t tile = oldest / kTile; tile * kTile < length; ++tile) {
      cache.read_tile(layer, head, tile, k_tile.data(), v_tile.data(), *runtime.kernels);
      for (int64_t j = 0; j < std::min(kTile, length - tile * kTile); ++j) {
        for (int64_t d = 0; d < dim; ++d) k.row(tile * kTile + j)[d] = k_tile.row(d)[j];
        std::copy_n(v_tile.row(j), dim, v.row(tile * kTile + j));
      }
    }
  }
  Tensor k, v;  // [length, D]
};

// Positions that a query sees: first .. its own.
int64_t first_key(const KvCache& cache, int64_t layer, int64_t position) {
  const int64_t window = cache.window(layer);
  return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
}

// Calls visit(row of the batch, position, query head, keys and values of its KV head).
template <typename Visit>
void for_queries(const Tensor& q, const LayerCache& cache, const Runtime& runtime, Visit visit) {
  for (const Run& run : cache.runs) {
    const int64_t kv_heads = run.cache->shape().kv_heads;
    const int64_t group = q.shape()[1] / kv_heads;
    const int64_t oldest = first_key(*run.cache, cache.layer, run.first_position);
    for (int64_t head = 0; head < kv_heads; ++head) {
      const HeadRows rows(*run.cache, cache.layer, head, oldest, run.first_position + run.rows, q.shape()[2],
                          runtime);
      for (int64_t r = 0; r < run.rows; ++r) {
        const int64_t position = run.first_position + r;
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
          visit(run.first_row + r, first_key(*run.cache, cache.layer, position), position, h, rows);
        }
      }
    }
  }
}

}  // namespace

CacheRows cache_rows(const LayerCache& cache, const Shape& shape, const Runtime& runtime) {
  CacheRows result{Tensor(shape), Tensor(shape)};
  const int64_t dim = shape[2];
  for (const Run& run : cache.runs) {
    for (int64_t head = 0; head < shape[1]; ++head) {
      const HeadRows rows(*run.cache, cache.layer, head, run.first_position, run.first_position + run.rows,
                          dim, runtime);
      for (int64_t r = 0; r < run.rows; ++r) {
        std::copy_n(rows.k.row(run.first_position + r), dim, result.k.row(run.first_row + r) + head * dim);
        std::copy_n(rows.v.row(run.first_position + r), dim, result.v.row(run.first_row + r) + head * dim);
      }
    }
  }
  return result;
}

Tensor plain_attention(const Tensor& q, const LayerCache& cache, float scale, const Runtime& runtime,
                       Taps& tap) {
  int64_t keys = 0;
  for (const Run& run : cache.runs) keys = std::max(keys, run.first_position + run.rows);
  const int64_t heads = q.shape()[1], dim = q.shape()[2];
  Tensor scores = Tensor::zeros({q.shape()[0], heads, keys});
  for_queries(q, cache, runtime,
              [&](int64_t t, int64_t first, int64_t last, int64_t h, const HeadRows& rows) {
                for (int64_t j = first; j <= last; ++j) {
                  double sum = 0;
                  for (int64_t d = 0; d < dim; ++d)
                    sum += static_cast<double>(q.row(t)[h * dim + d]) * rows.k.row(j)[d];
                  scores.row(t)[h * keys + j] = static_cast<float>(sum * scale);
                }
              });
  const int layer = static_cast<int>(cache.layer);
  tap(layer, Site::scores, scores);
  Tensor probs = Tensor::zeros(scores.shape());
  for_queries(q, cache, runtime, [&](int64_t t, int64_t first, int64_t last, int64_t h, const HeadRows&) {
    const float* from = scores.row(t) + h * keys;
    const float peak = *std::max_element(from + first, from + last + 1);
    double total = 0;
    for (int64_t j = first; j <= last; ++j) total += std::exp(static_cast<double>(from[j]) - peak);
    for (int64_t j = first; j <= last; ++j) {
      probs.row(t)[h * keys + j] = static_cast<float>(std::exp(static_cast<double>(from[j]) - peak) / total);
    }
  });
  tap(layer, Site::probs, probs);
  Tensor out(q.shape());
  for_queries(q, cache, runtime,
              [&](int64_t t, int64_t first, int64_t last, int64_t h, const HeadRows& rows) {
                for (int64_t d = 0; d < dim; ++d) {
                  double sum = 0;
                  for (int64_t j = first; j <= last; ++j)
                    sum += static_cast<double>(probs.row(t)[h * keys + j]) * rows.v.row(j)[d];
                  out.row(t)[h * dim + d] = static_cast<float>(sum);
                }
              });
  return out;
}

}  // namespace lockstep::nn

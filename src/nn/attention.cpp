#include "nn/attention.h"

#include <algorithm>
#include <limits>

#include "nn/inner_attention.h"

namespace lockstep::nn {
namespace {

constexpr int64_t kTile = KvCache::kTile;
// Rows of one session that share a pass over its tiles.
constexpr int64_t kRowsTogether = 16;

// Up to kRowsTogether rows of a run, with the query heads of one KV head.
struct Item {
  const Run* run;
  int64_t first_row;  // within the run
  int64_t rows;
  int64_t kv_head;
};

// Scratch of one item. Q = rows * group queries.
struct Scratch {
  Scratch(int64_t queries, int64_t dim, int64_t padded)
      : q({queries, dim}),
        k({dim, kTile}),
        v({kTile, padded}),
        part({queries, dim}),
        sums(Tensor::zeros({queries, dim})),
        first(static_cast<size_t>(queries)),
        last(static_cast<size_t>(queries)),
        tile_peak(static_cast<size_t>(queries)),
        tile_total(static_cast<size_t>(queries)),
        peak(static_cast<size_t>(queries), -std::numeric_limits<float>::infinity()),
        total(static_cast<size_t>(queries), 0.0F) {}

  Tensor q, k, v, part, sums;
  std::vector<int32_t> first, last;                       // [Q]
  std::vector<float> tile_peak, tile_total, peak, total;  // [Q]
};

void attend(const Item& item, const Tensor& q, int64_t layer, float scale, const Runtime& runtime,
            Tensor& out) {
  const KvCache& cache = *item.run->cache;
  const int64_t dim = q.shape()[2];
  const int64_t group = q.shape()[1] / cache.shape().kv_heads;
  const int64_t queries = item.rows * group;
  const int64_t window = cache.window(layer);
  const int64_t row = item.run->first_row + item.first_row;
  const int64_t position = item.run->first_position + item.first_row;
  Scratch s(queries, dim, cache.padded_dim());
  for (int64_t r = 0; r < item.rows; ++r) {
    const float* heads = q.row(row + r) + item.kv_head * group * dim;
    for (int64_t i = 0; i < group * dim; ++i) s.q.data()[r * group * dim + i] = heads[i] * scale;
  }

  kernels::AttentionTileArgs args;
  args.queries = queries;
  args.head_dim = dim;
  args.q = s.q.data();
  args.k = s.k.data();
  args.v = s.v.data();
  args.v_stride = cache.padded_dim();
  args.first = s.first.data();
  args.last = s.last.data();
  args.peak = s.tile_peak.data();
  args.total = s.tile_total.data();
  args.out = s.part.data();
  const int64_t oldest = window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
  for (int64_t tile = oldest / kTile; tile <= (position + item.rows - 1) / kTile; ++tile) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = position + i / group - tile * kTile;  // of the query, within the tile
      s.last[i] = static_cast<int32_t>(std::clamp<int64_t>(at + 1, 0, kTile));
      s.first[i] = window == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(at - window + 1, 0, kTile));
    }
    cache.read_tile(layer, item.kv_head, tile, s.k.data(), s.v.data(), *runtime.kernels);
    runtime.kernels->attention_tile(args);
    runtime.kernels->attention_merge(args, s.peak.data(), s.total.data(), s.sums.data());
  }
  for (int64_t i = 0; i < queries; ++i) {
    float* result = out.row(row + i / group) + (item.kv_head * group + i % group) * dim;
    for (int64_t d = 0; d < dim; ++d) {
      result[d] = s.total[i] == 0.0F ? 0.0F : s.sums.row(i)[d] / s.total[i];
    }
  }
}

}  // namespace

void append(const LayerCache& cache, const Tensor& k, const Tensor& v, const Runtime& runtime, Taps& tap) {
  for (const Run& run : cache.runs) {
    for (int64_t r = 0; r < run.rows; ++r) {
      run.cache->write(cache.layer, run.first_position + r, k.row(run.first_row + r),
                       v.row(run.first_row + r), *runtime.kernels);
    }
  }
  if (tap.inner(Site::k_cache) != Interest::none) show_cache_rows(cache, k.shape(), runtime, tap);
}

Tensor attention(const Tensor& q, const LayerCache& cache, float scale, const Runtime& runtime, Taps& tap) {
  if (tap.inner(Site::scores) != Interest::none) {
    Tensor plain = plain_attention(q, cache, scale, runtime, tap);
    if (tap.inner(Site::scores) == Interest::change) return plain;
  }
  Tensor out(q.shape());
  std::vector<Item> items;
  for (const Run& run : cache.runs) {
    for (int64_t r = 0; r < run.rows; r += kRowsTogether) {
      for (int64_t head = 0; head < run.cache->shape().kv_heads; ++head) {
        items.push_back({&run, r, std::min(kRowsTogether, run.rows - r), head});
      }
    }
  }
  runtime.pool->run(static_cast<int64_t>(items.size()),
                    [&](int64_t index) { attend(items[index], q, cache.layer, scale, runtime, out); });
  return out;
}

}  // namespace lockstep::nn

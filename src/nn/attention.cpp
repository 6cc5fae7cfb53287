#include "nn/attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "nn/inner_attention.h"

namespace lockstep::nn {
namespace {

constexpr int64_t kTile = KvCache::kTile;
// Rows of one session that share a pass over its tiles: so many, and more where they have few queries.
constexpr int64_t kRowsTogether = 16, kQueriesTogether = 128;
// Tiles that are merged among themselves before they are merged with the rest. Fixed, and counted from
// position 0, so that threads may take them apart without changing a result.
constexpr int64_t kTilesTogether = 16;
// From here on it pays to turn a tile of f16 to f32 once for all queries.
constexpr int64_t kManyQueries = 12;

// Some rows of a run, with the query heads of one KV head.
struct Item {
  const Run* run;
  int64_t first_row;  // within the run
  int64_t rows;
  int64_t kv_head;
};

// Attention of Q queries to some keys; undefined where nothing has been written.
struct Part {
  Part(int64_t queries, int64_t dim) : peak({queries}), total({queries}), out({queries, dim}) {}

  kernels::AttentionPart view() { return {peak.data(), total.data(), out.data()}; }

  Tensor peak, total;  // [Q]
  Tensor out;          // [Q, D]
};

// Tiles that the rows of an item see.
struct Tiles {
  int64_t first, last;
};
Tiles tiles_of(const Item& item, int64_t layer) {
  const int64_t position = item.run->first_position + item.first_row;
  const int64_t window = item.run->cache->window(layer);
  return {window == 0 ? 0 : std::max<int64_t>(0, position - window + 1) / kTile,
          (position + item.rows - 1) / kTile};
}

int64_t group_of(const Item& item, const Tensor& q) {
  return q.shape()[1] / item.run->cache->shape().kv_heads;
}

// One item at work. Q = rows * group queries.
class Attend {
 public:
  Attend(const Item& item, const Tensor& q, int64_t layer, float scale, const Runtime& runtime)
      : kernels_(*runtime.kernels),
        cache_(*item.run->cache),
        layer_(layer),
        kv_head_(item.kv_head),
        dim_(q.shape()[2]),
        group_(group_of(item, q)),
        queries_(item.rows * group_),
        position_(item.run->first_position + item.first_row),
        tiles_(tiles_of(item, layer)),
        q_({queries_, dim_}),
        converts_(cache_.type() == KvType::q8 || (cache_.type() == KvType::f16 && queries_ >= kManyQueries)),
        first_(static_cast<size_t>(queries_)),
        last_(static_cast<size_t>(queries_)),
        tile_(queries_, dim_),
        block_(queries_, dim_) {
    const int64_t row = item.run->first_row + item.first_row;
    for (int64_t r = 0; r < item.rows; ++r) {
      const float* heads = q.row(row + r) + kv_head_ * group_ * dim_;
      kernels_.scale(heads, scale, group_ * dim_, q_.row(r * group_));
    }
    if (converts_) {
      k_ = Tensor({dim_, kTile});
      v_ = Tensor({kTile, cache_.padded_dim()});
    }
    if (cache_.type() == KvType::i16) round_queries();
  }

  int64_t queries() const { return queries_; }

  // Blocks [first, last], one after the other.
  void blocks(int64_t first, int64_t last, Part& into) {
    block(first, into);
    for (int64_t b = first + 1; b <= last; ++b) {
      block(b, block_);
      kernels_.attention_merge(block_.view(), queries_, dim_, into.view());
    }
  }

 private:
  int64_t window() const { return cache_.window(layer_); }

  void round_queries() {
    const int64_t stride = (dim_ + 1) / 2 * 2;
    q_i16_.resize(static_cast<size_t>(queries_ * stride));
    q_scale_.resize(static_cast<size_t>(queries_));
    const int32_t largest = kernels::largest_key(dim_);
    for (int64_t i = 0; i < queries_; ++i)
      q_scale_[i] = kernels_.to_i16(q_.row(i), dim_, largest, &q_i16_[i * stride]);
  }

  // The tiles of one block, merged among themselves.
  void block(int64_t index, Part& into) {
    const int64_t from = std::max(tiles_.first, index * kTilesTogether);
    const int64_t to = std::min(tiles_.last, (index + 1) * kTilesTogether - 1);
    one_tile(from, into);
    for (int64_t tile = from + 1; tile <= to; ++tile) {
      one_tile(tile, tile_);
      kernels_.attention_merge(tile_.view(), queries_, dim_, into.view());
    }
  }

  void one_tile(int64_t tile, Part& into) {
    kernels::AttentionTileArgs args;
    static_cast<kernels::AttentionPart&>(args) = into.view();
    args.queries = queries_;
    args.head_dim = dim_;
    args.q = q_.data();
    args.q_i16 = q_i16_.data();
    args.q_scale = q_scale_.data();
    args.v_stride = cache_.padded_dim();
    args.first = first_.data();
    args.last = last_.data();
    for (int64_t i = 0, at = position_ - tile * kTile; i < queries_; i += group_, ++at) {  // within the tile
      const int64_t first = window() == 0 ? 0 : std::clamp<int64_t>(at - window() + 1, 0, kTile);
      std::fill_n(&first_[i], group_, static_cast<int32_t>(first));
      std::fill_n(&last_[i], group_, static_cast<int32_t>(std::clamp<int64_t>(at + 1, 0, kTile)));
    }
    if (converts_) {
      cache_.read_tile(layer_, kv_head_, tile, k_.data(), v_.data(), kernels_);
      args.tile = {kernels::TileForm::f32, k_.data(), v_.data()};
    } else {
      args.tile = cache_.stored_tile(layer_, kv_head_, tile);
      args.next = cache_.stored_tile(layer_, kv_head_, std::min(tile + 1, tiles_.last)).k;
    }
    kernels_.attention_tile(args);
  }

  const kernels::Table& kernels_;
  const KvCache& cache_;
  int64_t layer_, kv_head_, dim_, group_, queries_;
  int64_t position_;  // of the first row
  Tiles tiles_;
  Tensor q_;                           // [Q, D], scaled
  std::vector<int16_t> q_i16_;         // [Q, D, even]; for a cache of i16
  std::vector<float> q_scale_;         // [Q]; for a cache of i16
  bool converts_;                      // tiles to f32, else they are read where they lie
  Tensor k_, v_;                       // [D, 64], [64, padded]; if so
  std::vector<int32_t> first_, last_;  // [Q]
  Part tile_, block_;
};

// out = sums / total, each query to its row and head.
void write_out(const Item& item, const Part& part, int64_t group, const Runtime& runtime, Tensor& out) {
  const int64_t dim = out.shape()[2];
  for (int64_t i = 0; i < part.out.shape()[0]; ++i) {
    float* result =
        out.row(item.run->first_row + item.first_row + i / group) + (item.kv_head * group + i % group) * dim;
    const float total = part.total.data()[i];
    if (total == 0.0F)
      std::fill_n(result, dim, 0.0F);  // no key was seen
    else
      runtime.kernels->divide(part.out.row(i), total, dim, result);
  }
}

// Few items with many keys are taken apart into blocks of tiles, which are merged afterwards.
Tensor attend(const std::vector<Item>& items, const Tensor& q, int64_t layer, float scale,
              const Runtime& runtime) {
  struct Piece {
    size_t item;
    int64_t first_block, last_block;
  };
  std::vector<Piece> pieces;
  std::vector<size_t> first_piece;  // [items + 1]
  const bool few = static_cast<int64_t>(items.size()) < 4 * runtime.pool->threads();
  for (size_t i = 0; i < items.size(); ++i) {
    first_piece.push_back(pieces.size());
    const Tiles tiles = tiles_of(items[i], layer);
    const int64_t last = tiles.last / kTilesTogether;
    for (int64_t b = tiles.first / kTilesTogether; b <= last; b = few ? b + 1 : last + 1)
      pieces.push_back({i, b, few ? b : last});
  }
  first_piece.push_back(pieces.size());
  const int64_t dim = q.shape()[2];
  Tensor out(q.shape());
  std::vector<std::unique_ptr<Part>> parts(pieces.size());
  runtime.pool->run(static_cast<int64_t>(pieces.size()), [&](int64_t index) {
    const Piece& piece = pieces[index];
    const Item& item = items[piece.item];
    Attend at_work(item, q, layer, scale, runtime);
    auto part = std::make_unique<Part>(at_work.queries(), dim);
    at_work.blocks(piece.first_block, piece.last_block, *part);
    if (first_piece[piece.item + 1] - first_piece[piece.item] == 1)
      write_out(item, *part, group_of(item, q), runtime, out);
    else
      parts[index] = std::move(part);
  });
  for (size_t i = 0; i < items.size(); ++i) {
    if (first_piece[i + 1] - first_piece[i] == 1) continue;
    Part& whole = *parts[first_piece[i]];
    for (size_t p = first_piece[i] + 1; p < first_piece[i + 1]; ++p)
      runtime.kernels->attention_merge(parts[p]->view(), whole.out.shape()[0], dim, whole.view());
    write_out(items[i], whole, group_of(items[i], q), runtime, out);
  }
  return out;
}

// Rows [T, Hkv, D] to the caches of their sessions, by all threads.
void store(const LayerCache& cache, const Tensor& k, const Tensor& v, const Runtime& runtime) {
  struct Piece {
    const Run* run;
    int64_t begin, end;  // positions in one tile
  };
  std::vector<Piece> pieces;
  for (const Run& run : cache.runs) {
    const int64_t end = run.first_position + run.rows;
    run.cache->reserve(cache.layer, run.first_position, end);
    for (int64_t p = run.first_position; p < end; p = pieces.back().end)
      pieces.push_back({&run, p, std::min(end, (p / kTile + 1) * kTile)});
  }
  runtime.pool->run(static_cast<int64_t>(pieces.size()), [&](int64_t index) {
    const auto& [run, begin, end] = pieces[index];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = run->first_row + p - run->first_position;
      run->cache->write(cache.layer, p, k.row(row), v.row(row), *runtime.kernels);
    }
  });
}

}  // namespace

void append(const LayerCache& cache, const Tensor& k, const Tensor& v, const Runtime& runtime, Taps& tap) {
  store(cache, k, v, runtime);
  const Interest interest = std::max(tap.inner(Site::k_cache), tap.inner(Site::v_cache));
  if (interest == Interest::none) return;
  auto [stored_k, stored_v] = cache_rows(cache, k.shape(), runtime);
  const int layer = static_cast<int>(cache.layer);
  tap(layer, Site::k_cache, stored_k);
  tap(layer, Site::v_cache, stored_v);
  if (interest == Interest::change) store(cache, stored_k, stored_v, runtime);
}

Tensor attention(const Tensor& q, const LayerCache& cache, float scale, const Runtime& runtime, Taps& tap) {
  const Interest interest = std::max(tap.inner(Site::scores), tap.inner(Site::probs));
  if (interest != Interest::none) {
    Tensor plain = plain_attention(q, cache, scale, runtime, tap);
    if (interest == Interest::change) return plain;
  }
  std::vector<Item> items;
  for (const Run& run : cache.runs) {
    const int64_t heads = run.cache->shape().kv_heads;
    const int64_t together = std::max(kRowsTogether, kQueriesTogether * heads / q.shape()[1]);
    // The last rows have the most keys, and short items at the end let threads end together.
    for (int64_t r = (run.rows + together - 1) / together * together - together; r >= 0; r -= together) {
      for (int64_t head = 0; head < heads; ++head)
        items.push_back({&run, r, std::min(together, run.rows - r), head});
    }
  }
  return attend(items, q, cache.layer, scale, runtime);
}

}  // namespace lockstep::nn

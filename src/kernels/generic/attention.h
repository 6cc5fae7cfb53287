// Softmax attention over tiles of 64 keys: every tile is computed for itself with its own maximum,
// then merged, so the result does not depend on how tiles were spread over passes or threads.

constexpr int64_t kTileKeys = 64;
constexpr int kTileParts = kTileKeys / kLanes;

struct KeyF32 {
  using Element = float;
  static F get(const float* p) { return load(p); }
};
struct KeyF16 {
  using Element = uint16_t;
  static F get(const uint16_t* p) { return load_f16(p); }
};

template <typename Element>
inline void fetch_elements(const Element* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(Element))) __builtin_prefetch(p + i);
}

// Scores of R queries become weights [R, 64], their peak and their sum; 0 for keys that do not count.
template <typename Key, int R>
inline void tile_weights(const AttentionTileArgs& args, int64_t query, float* weights) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const auto* k = static_cast<const typename Key::Element*>(args.k);
  const float* q = args.q + query * args.head_dim;
  const auto* values = static_cast<const typename Key::Element*>(args.v);
  F score[R][kTileParts];
  for (int begin = 0; begin < kTileParts; begin += kKeyParts) {
    F sums[R][kKeyParts];
    for (auto& row : sums) {
      for (F& part : row) part = zero();
    }
    for (int64_t d = 0; d < args.head_dim; ++d) {
      // The first queries bring keys and values from memory: values while keys are at work, and so on.
      if (query == 0 && begin == 0 && args.next != nullptr && d < kTileKeys)
        fetch_elements(values + d * args.v_stride, args.v_stride);
      F keys[kKeyParts];
      for (int i = 0; i < kKeyParts; ++i) keys[i] = Key::get(k + d * kTileKeys + 16 * (begin + i));
      for (int r = 0; r < R; ++r) {
        const F value = set1(q[r * args.head_dim + d]);
        for (int i = 0; i < kKeyParts; ++i) sums[r][i] = fma(value, keys[i], sums[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) std::copy_n(sums[r], kKeyParts, score[r] + begin);
  }
  for (int r = 0; r < R; ++r) {
    const int first = args.first[query + r], last = args.last[query + r];
    // seen(part, x, other): x of keys that count.
    const auto weigh = [&](const auto& seen) {
      F peaks = set1(lowest);
      for (int part = 0; part < kTileParts; ++part) {
        score[r][part] = seen(part, score[r][part], set1(lowest));
        peaks = max(peaks, score[r][part]);
      }
      const float peak = largest(peaks);
      F totals = zero();
      for (int part = 0; part < kTileParts; ++part) {
        const F p = seen(part, exp(score[r][part] - set1(peak)), zero());
        store(weights + r * kTileKeys + 16 * part, p);
        totals = totals + p;
      }
      args.peak[query + r] = peak;
      args.total[query + r] = sum(totals);
    };
    if (first <= 0 && last >= kTileKeys)
      weigh([](int, F x, F) { return x; });
    else
      weigh([&](int part, F x, F other) {
        return select_range(first - 16 * part, last - 16 * part, x, other);
      });
  }
}

// Values times weights of R queries, V vectors of the head from dimension d. What a query does not see is
// left out, not multiplied by 0: it may be infinite.
template <typename Key, int R, int V>
inline void tile_values(const AttentionTileArgs& args, int64_t query, const float* weights, int64_t d) {
  const auto* v = static_cast<const typename Key::Element*>(args.v);
  int from = kTileKeys, all_from = 0, all_to = kTileKeys, to = 0;
  for (int r = 0; r < R; ++r) {
    from = std::min(from, args.first[query + r]);
    all_from = std::max(all_from, args.first[query + r]);
    all_to = std::min(all_to, args.last[query + r]);
    to = std::max(to, args.last[query + r]);
  }
  F sums[R][V];
  for (auto& row : sums) {
    for (F& part : row) part = zero();
  }
  const auto* next = static_cast<const typename Key::Element*>(args.next);
  const bool fetches = query == 0 && d == 0 && args.next != nullptr;
  const auto keys = [&]<bool kAll>(int begin, int end) {
    for (int j = begin; j < end; ++j) {
      if (fetches && j < args.head_dim) fetch_elements(next + j * kTileKeys, kTileKeys);
      F values[V];
      for (int i = 0; i < V; ++i) values[i] = Key::get(v + j * args.v_stride + d + i * kLanes);
      for (int r = 0; r < R; ++r) {
        if (!kAll && (j < args.first[query + r] || j >= args.last[query + r])) continue;
        const F weight = set1(weights[r * kTileKeys + j]);
        for (int i = 0; i < V; ++i) sums[r][i] = fma(weight, values[i], sums[r][i]);
      }
    }
  };
  // Most keys are seen by all of the queries, which is faster to do.
  all_from = std::min(std::max(all_from, from), to);
  all_to = std::clamp(all_to, all_from, to);
  keys.template operator()<false>(from, all_from);
  keys.template operator()<true>(all_from, all_to);
  keys.template operator()<false>(all_to, to);
  for (int r = 0; r < R; ++r) {
    float* out = args.out + (query + r) * args.head_dim;
    for (int i = 0; i < V; ++i) store_part(out + d + i * kLanes, args.head_dim - d - i * kLanes, sums[r][i]);
  }
}

template <typename Key, int R>
void tile_queries(const AttentionTileArgs& args, int64_t query) {
  // Of many rows the first do not see the last's tile.
  if (std::all_of(args.last + query, args.last + query + R, [](int32_t last) { return last <= 0; })) {
    std::fill_n(args.peak + query, R, -std::numeric_limits<float>::infinity());
    std::fill_n(args.total + query, R, 0.0F);
    return;
  }
  float weights[R * kTileKeys];
  tile_weights<Key, R>(args, query, weights);
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= args.v_stride; d += kValueVectors * kLanes)
    tile_values<Key, R, kValueVectors>(args, query, weights, d);
  for (; d < args.v_stride; d += kLanes) tile_values<Key, R, 1>(args, query, weights, d);
}

void attention_tile(const AttentionTileArgs& args) {
  tile_rows<kQueryTile>(args.queries, [&]<int R>(int64_t query) {
    if (args.half)
      tile_queries<KeyF16, R>(args, query);
    else
      tile_queries<KeyF32, R>(args, query);
  });
}

void attention_merge(const AttentionPart& part, int64_t queries, int64_t head_dim,
                     const AttentionPart& into) {
  for (int64_t first = 0; first < queries; first += kLanes) {
    const int64_t count = std::min(kLanes, queries - first);
    // max passes a NaN of its second argument on.
    const F before = load_part(into.peak + first, count, 0), added = load_part(part.peak + first, count, 0);
    const F top = max(before, added);
    float keeps[kLanes], takes[kLanes], tops[kLanes];
    store(keeps, exp(before - top));
    store(takes, exp(added - top));
    store(tops, top);
    for (int64_t i = first; i < first + count; ++i) {
      // A sum of exponentials holds a 1: it is 0 only where no key was seen.
      if (part.total[i] == 0.0F) continue;
      const bool none = into.peak[i] == -std::numeric_limits<float>::infinity();
      const float keep = none ? 0.0F : keeps[i - first], take = takes[i - first];
      into.total[i] = into.total[i] * keep + part.total[i] * take;
      float* sums = into.out + i * head_dim;
      const float* added_sums = part.out + i * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int64_t left = head_dim - d;
        store_part(
            sums + d, left,
            load_part(sums + d, left, 0) * set1(keep) + load_part(added_sums + d, left, 0) * set1(take));
      }
      into.peak[i] = tops[i - first];
    }
  }
}

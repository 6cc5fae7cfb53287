// Softmax attention over tiles of 64 keys: every tile is computed for itself with its own maximum,
// then merged, so the result does not depend on how tiles were spread over passes or threads.

constexpr int kTileParts = kTileKeys / kLanes;

// Forms of tiles: a lane has kTogether dimensions of a key, or keys of a dimension, and meets a factor of the
// same size, of a query or of weights.
struct FormF32 {
  using Sum = F;
  using Vector = F;
  using Weight = float;
  static constexpr bool kIntegers = false;
  static constexpr int64_t kTogether = 1;
  static constexpr int64_t kBytes = 4;  // of a lane
  static F none() { return zero(); }
  static F get(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
  static F factor(const std::byte* p) { return set1(*reinterpret_cast<const float*>(p)); }
  static F add(F sum, F x, F y) { return fma(y, x, sum); }
};
struct FormF16 : FormF32 {
  static constexpr int64_t kBytes = 2;
  static F get(const std::byte* p) { return load_f16(p); }
};
struct FormI16 {
  using Sum = I;
  using Vector = B;
  using Weight = int16_t;
  static constexpr bool kIntegers = true;
  static constexpr int64_t kTogether = 2;
  static constexpr int64_t kBytes = 4;
  static I none() { return int_zero(); }
  static B get(const std::byte* p) { return load_bytes(p); }
  static B factor(const std::byte* p) { return broadcast(reinterpret_cast<const int8_t*>(p)); }
  static I add(I sum, B x, B y) { return add_words(sum, x, y); }
};
constexpr int64_t kFactor = 4;  // bytes

// sums[r][i] += lanes [u][i] times factors [r][u], for units [begin, end) of what counts(u, r). x_stride:
// bytes from unit to unit; stride: factors from row to row. Calls meanwhile(u) beside. All loops are unrolled
// early, which GCC wants to be told, or sums go to memory and back.
template <typename Form, int R, int V, typename Meanwhile, typename Counts>
inline void add_products(typename Form::Sum (&sums)[R][V], const std::byte* x, int64_t x_stride,
                         const std::byte* factors, int64_t stride, int64_t begin, int64_t end,
                         const Meanwhile& meanwhile, const Counts& counts) {
  for (int64_t u = begin; u < end; ++u) {
    meanwhile(u);
    typename Form::Vector lanes[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) lanes[i] = Form::get(x + u * x_stride + i * kLanes * Form::kBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (!counts(u, r)) continue;
      const auto factor = Form::factor(factors + (r * stride + u) * kFactor);
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) sums[r][i] = Form::add(sums[r][i], lanes[i], factor);
    }
  }
}
template <typename Form, int R, int V>
inline void clear(typename Form::Sum (&sums)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sums[r][i] = Form::none();
  }
}

// Scores of R queries with the first keys of a tile, kParts times 16.
template <typename Form, int R, int kParts>
inline void tile_scores(const AttentionTileArgs& args, int64_t query, F (&score)[R][kParts]) {
  constexpr int kTogether = std::min(kKeyParts, kParts);
  const int64_t units = (args.head_dim + Form::kTogether - 1) / Form::kTogether;
  const auto* k = static_cast<const std::byte*>(args.tile.k);
  const auto* v = static_cast<const std::byte*>(args.tile.v);
  const auto* q = Form::kIntegers ? reinterpret_cast<const std::byte*>(args.q_i16)
                                  : reinterpret_cast<const std::byte*>(args.q);
  for (int begin = 0; begin < kParts; begin += kTogether) {
    typename Form::Sum sums[R][kTogether];
    clear<Form>(sums);
    // The first queries bring keys and values from memory: values while keys are at work, and so on.
    const bool fetches = query == 0 && begin == 0 && args.next != nullptr;
    const auto meanwhile = [&](int64_t u) {
      if (fetches && u < kTileKeys / Form::kTogether)
        fetch<3>(v + u * args.v_stride * Form::kBytes, args.v_stride * Form::kBytes);
    };
    add_products<Form>(sums, k + begin * kLanes * Form::kBytes, kTileKeys * Form::kBytes,
                       q + query * units * kFactor, units, 0, units, meanwhile,
                       [](int64_t, int) { return true; });
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i) {
        if constexpr (Form::kIntegers) {
          const F scale = load(args.tile.k_scale + kLanes * (begin + i)) * set1(args.q_scale[query + r]);
          score[r][begin + i] = to_float(sums[r][i]) * scale;
        } else {
          score[r][begin + i] = sums[r][i];
        }
      }
    }
  }
}

// Scores of R queries become weights, their peak and their sum; 0 for keys that do not count. seen(r, part,
// x, other): x of keys that count. One step after the other for all queries: each has to wait for its own.
template <int R, int kParts, typename Seen>
inline void weigh(const AttentionTileArgs& args, int64_t query, F (&score)[R][kParts], const Seen& seen) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F peaks[R], totals[R];
  for (int r = 0; r < R; ++r) {
    peaks[r] = set1(lowest);
    for (int part = 0; part < kParts; ++part) {
      score[r][part] = seen(r, part, score[r][part], set1(lowest));
      peaks[r] = max(peaks[r], score[r][part]);
    }
  }
  for (int r = 0; r < R; ++r) args.peak[query + r] = largest(peaks[r]);
  for (int r = 0; r < R; ++r) {
    const F peak = set1(args.peak[query + r]);
    totals[r] = zero();
    for (int part = 0; part < kParts; ++part) {
      score[r][part] = seen(r, part, exp(score[r][part] - peak), zero());
      totals[r] = totals[r] + score[r][part];
    }
  }
  for (int r = 0; r < R; ++r) args.total[query + r] = sum(totals[r]);
}

// Weights of R queries times the scales of their values, rounded to integers [R, 64]; scales[r] brings sums
// back. A weight that is not finite makes its scale NaN.
template <int R, int kParts, typename Seen>
inline void round_weights(const AttentionTileArgs& args, F (&weight)[R][kParts], int16_t* words,
                          float* scales, const Seen& seen) {
  constexpr auto kLargest = static_cast<float>(kLargestWeight);
  F peaks[R];
  for (int r = 0; r < R; ++r) {
    peaks[r] = zero();
    for (int part = 0; part < kParts; ++part) {
      weight[r][part] = seen(r, part, weight[r][part] * load(args.tile.v_scale + kLanes * part), zero());
      peaks[r] = larger_magnitude(peaks[r], weight[r][part]);
    }
  }
  F inverse[R];
  for (int r = 0; r < R; ++r) {
    const float peak = std::max(largest_magnitude(peaks[r]), 0x1p-100F);
    scales[r] = peak * (1 / kLargest);
    inverse[r] = set1(kLargest / peak);
  }
  for (int r = 0; r < R; ++r) {
    for (int part = 0; part < kParts; ++part)
      store_words(words + r * kTileKeys + kLanes * part, round_to_int(weight[r][part] * inverse[r]));
  }
}

// Calls use(seen) with what `weigh` takes.
template <int R, typename Use>
inline void for_seen(const AttentionTileArgs& args, int64_t query, const Use& use) {
  const int32_t *first = args.first + query, *last = args.last + query;
  if (*std::max_element(first, first + R) <= 0 && *std::min_element(last, last + R) >= kTileKeys)
    use([](int, int, F x, F) { return x; });
  else
    use([&](int r, int part, F x, F other) {
      return select_range(first[r] - kLanes * part, last[r] - kLanes * part, x, other);
    });
}

// Values times weights of R queries, V vectors of the head from dimension d; scales: of sums of integers.
template <typename Form, int R, int V>
inline void tile_values(const AttentionTileArgs& args, int64_t query, const typename Form::Weight* weights,
                        const float* scales, int64_t d) {
  const int32_t *first = args.first + query, *last = args.last + query;
  int64_t from = *std::min_element(first, first + R), to = *std::max_element(last, last + R);
  int64_t all_from = *std::max_element(first, first + R), all_to = *std::min_element(last, last + R);
  const auto* next = static_cast<const std::byte*>(args.next);
  const bool fetches = query == 0 && d == 0 && args.next != nullptr;
  const auto meanwhile = [&](int64_t u) {
    if (fetches && u * Form::kTogether < args.head_dim)
      fetch<3>(next + u * kTileKeys * Form::kBytes, kTileKeys * Form::kBytes);
  };
  typename Form::Sum sums[R][V];
  clear<Form>(sums);
  const auto keys = [&](int64_t begin, int64_t end, const auto& counts) {
    add_products<Form>(sums, static_cast<const std::byte*>(args.tile.v) + d * Form::kBytes,
                       args.v_stride * Form::kBytes, reinterpret_cast<const std::byte*>(weights),
                       kTileKeys / Form::kTogether, begin, end, meanwhile, counts);
  };
  const auto all = [](int64_t, int) { return true; };
  if constexpr (Form::kIntegers) {
    // What a query does not see is a finite number times 0.
    keys(from / 2, (to + 1) / 2, all);
  } else {
    // What a query does not see is left out, not multiplied by 0: it may be infinite. Most keys are seen by
    // all of the queries, which is faster to do.
    const auto seen = [&](int64_t u, int r) { return u >= first[r] && u < last[r]; };
    all_from = std::min(std::max(all_from, from), to);
    all_to = std::clamp(all_to, all_from, to);
    keys(from, all_from, seen);
    keys(all_from, all_to, all);
    keys(all_to, to, seen);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* out = args.out + (query + r) * args.head_dim + d;
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      const int64_t left = args.head_dim - d - i * kLanes;
      if constexpr (Form::kIntegers)
        store_part(out + i * kLanes, left, to_float(sums[r][i]) * set1(scales[r]));
      else
        store_part(out + i * kLanes, left, sums[r][i]);
    }
  }
}

// R queries, none of which sees a key behind the first kParts times 16.
template <typename Form, int R, int kParts>
inline void tile_queries(const AttentionTileArgs& args, int64_t query) {
  F score[R][kParts];
  typename Form::Weight weights[R * kTileKeys];
  float scales[R];
  tile_scores<Form>(args, query, score);
  for_seen<R>(args, query, [&](const auto& seen) {
    weigh(args, query, score, seen);
    if constexpr (Form::kIntegers) round_weights(args, score, weights, scales, seen);
  });
  if constexpr (!Form::kIntegers) {
    for (int r = 0; r < R; ++r) {
      for (int part = 0; part < kParts; ++part)
        store(weights + r * kTileKeys + kLanes * part, score[r][part]);
    }
  }
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= args.v_stride; d += kValueVectors * kLanes)
    tile_values<Form, R, kValueVectors>(args, query, weights, scales, d);
  for (; d < args.v_stride; d += kLanes) tile_values<Form, R, 1>(args, query, weights, scales, d);
}

template <typename Form, int R>
void tile_queries(const AttentionTileArgs& args, int64_t query) {
  const int32_t last = *std::max_element(args.last + query, args.last + query + R);
  if (last <= 0) {  // of many rows the first do not see the last's tile
    std::fill_n(args.peak + query, R, -std::numeric_limits<float>::infinity());
    std::fill_n(args.total + query, R, 0.0F);
  } else if (last <= kTileKeys / 2) {
    tile_queries<Form, R, kTileParts / 2>(args, query);
  } else {
    tile_queries<Form, R, kTileParts>(args, query);
  }
}

void attention_tile(const AttentionTileArgs& args) {
  tile_rows<kQueryTile>(args.queries, [&]<int R>(int64_t query) {
    switch (args.tile.form) {
      case TileForm::f32: tile_queries<FormF32, R>(args, query); break;
      case TileForm::f16: tile_queries<FormF16, R>(args, query); break;
      case TileForm::i16: tile_queries<FormI16, R>(args, query); break;
    }
  });
}

float to_i16(const float* x, int64_t n, int32_t largest, int16_t* y) {
  F peaks = zero();
  for (int64_t i = 0; i < n; i += kLanes) peaks = larger_magnitude(peaks, load_part(x + i, n - i));
  const float found = largest_magnitude(peaks);
  const bool fits = found <= 0x1p118F;  // not NaN
  const float peak = fits ? std::max(found, 0x1p-100F) : 1.0F;
  const F inverse = set1(static_cast<float>(largest) / peak);
  for (int64_t i = 0; i < n; i += kLanes) {
    const I integers = round_to_int(load_part(x + i, n - i) * inverse);
    if (n - i >= kLanes) {
      store_words(y + i, integers);
      continue;
    }
    int16_t words[kLanes];
    store_words(words, integers);
    std::copy_n(words, n - i, y + i);
  }
  if (n % 2 != 0) y[n] = 0;
  return fits ? peak / static_cast<float>(largest) : std::numeric_limits<float>::quiet_NaN();
}

void attention_merge(const AttentionPart& part, int64_t queries, int64_t head_dim,
                     const AttentionPart& into) {
  for (int64_t first = 0; first < queries; first += kLanes) {
    const int64_t count = std::min(kLanes, queries - first);
    // max passes a NaN of its second argument on.
    const F before = load_part(into.peak + first, count), added = load_part(part.peak + first, count);
    const F top = max(before, added);
    float keeps[kLanes], takes[kLanes], tops[kLanes];
    store(keeps, exp(before - top));
    store(takes, exp(added - top));
    store(tops, top);
    for (int64_t i = first; i < first + count; ++i) {
      // A sum of exponentials holds a 1: it is 0 only where no key was seen.
      if (part.total[i] == 0.0F) continue;
      float* sums = into.out + i * head_dim;
      const float* added_sums = part.out + i * head_dim;
      if (into.total[i] == 0.0F) {
        into.total[i] = part.total[i];
        std::copy_n(added_sums, head_dim, sums);
      } else {
        const float keep = keeps[i - first], take = takes[i - first];
        into.total[i] = into.total[i] * keep + part.total[i] * take;
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          const int64_t left = head_dim - d;
          store_part(sums + d, left,
                     load_part(sums + d, left) * set1(keep) + load_part(added_sums + d, left) * set1(take));
        }
      }
      into.peak[i] = tops[i - first];
    }
  }
}

// Softmax attention over tiles of 64 keys: every tile is computed for itself with its own maximum,
// then merged, so the result does not depend on how tiles were spread over passes or threads.

constexpr int64_t kTileKeys = 64;

void attention_tile(const AttentionTileArgs& args) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < args.queries; ++i) {
    const float* q = args.q + i * args.head_dim;
    float* out = args.out + i * args.head_dim;
    const int first = args.first[i];
    const int last = args.last[i];
    F score[4] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < args.head_dim; ++d) {
      const F value = set1(q[d]);
      for (int part = 0; part < 4; ++part) {
        score[part] = fma(value, load(args.k + d * kTileKeys + 16 * part), score[part]);
      }
    }
    F peaks = set1(lowest);
    for (int part = 0; part < 4; ++part) {
      score[part] = select_range(first - 16 * part, last - 16 * part, score[part], set1(lowest));
      peaks = max(peaks, score[part]);
    }
    const float peak = largest(peaks);
    float weight[kTileKeys];
    F totals = zero();
    for (int part = 0; part < 4; ++part) {
      const F p = select_range(first - 16 * part, last - 16 * part, exp(score[part] - set1(peak)), zero());
      store(weight + 16 * part, p);
      totals = totals + p;
    }
    args.peak[i] = peak;
    args.total[i] = sum(totals);
    for (int64_t d = 0; d < args.head_dim; d += kLanes) {
      F value = zero();
      for (int j = first; j < last; ++j) {
        value = fma(set1(weight[j]), load(args.v + j * args.v_stride + d), value);
      }
      store_part(out + d, args.head_dim - d, value);
    }
  }
}

void attention_merge(const AttentionTileArgs& tile, float* peak, float* total, float* out) {
  for (int64_t i = 0; i < tile.queries; ++i) {
    if (tile.first[i] >= tile.last[i]) continue;
    // max passes a NaN of its second argument on.
    float lanes[kLanes];
    const float top = tile.peak[i] > peak[i] || tile.peak[i] != tile.peak[i] ? tile.peak[i] : peak[i];
    store(lanes, exp(set1(peak[i]) - set1(top)));
    const float keep = peak[i] == -std::numeric_limits<float>::infinity() ? 0.0F : lanes[0];
    store(lanes, exp(set1(tile.peak[i]) - set1(top)));
    const float take = lanes[0];
    total[i] = total[i] * keep + tile.total[i] * take;
    float* sums = out + i * tile.head_dim;
    const float* part = tile.out + i * tile.head_dim;
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      const int64_t count = tile.head_dim - d;
      store_part(sums + d, count,
                 load_part(sums + d, count, 0) * set1(keep) + load_part(part + d, count, 0) * set1(take));
    }
    peak[i] = top;
  }
}

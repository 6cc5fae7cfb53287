// What products share: tiles of rows and panels, and where their outputs go.

// Writes the lanes of a panel that are rows of the matrix.
inline void store_outputs(const LinearArgs& args, int64_t panel, int64_t row, F value) {
  const int64_t begin = panel * kLanes;
  const int64_t count = args.weight->rows - begin;
  float* y = args.y + row * args.y_stride + begin;
  if (count >= kLanes) {
    store(y, value);
  } else {
    float lanes[kLanes];
    store(lanes, value);
    std::memcpy(y, lanes, static_cast<size_t>(count) * sizeof(float));
  }
}

// The lanes from which a panel's sums go on: where those of the row start, or those of the columns before.
inline F load_outputs(const LinearArgs& args, int64_t panel, int64_t row) {
  if (!args.accumulate) return args.x_start != nullptr ? set1(args.x_start[row]) : zero();
  const int64_t begin = panel * kLanes;
  const int64_t count = args.weight->rows - begin;
  const float* y = args.y + row * args.y_stride + begin;
  if (count >= kLanes) return load(y);
  float lanes[kLanes] = {};
  std::memcpy(lanes, y, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}

// Asks for where outputs will be stored.
inline void fetch_outputs(const LinearArgs& args, int64_t panel, int panels, int64_t row) {
  const float* y = args.y + row * args.y_stride + panel * kLanes;
  for (int p = 0; p < panels; ++p) __builtin_prefetch(y + p * kLanes, 1, 2);
}

// Calls rows<R>(row) over all rows, in tiles of R = kTile and smaller last ones.
template <int kTile, typename Rows>
inline void tile_rows(int64_t count, const Rows& rows) {
  int64_t row = 0;
  for (; row + kTile <= count; row += kTile) rows.template operator()<kTile>(row);
  if constexpr (kTile > 1) {
    if (kTile > 4 && row + 4 <= count) {
      rows.template operator()<4>(row);
      row += 4;
    }
    if (kTile > 2 && row + 2 <= count) {
      rows.template operator()<2>(row);
      row += 2;
    }
    if (row < count) rows.template operator()<1>(row);
  }
}

// Panels that stay in the second cache while kRowsTogether rows pass by, for the rows that follow.
constexpr int64_t kPanelsTogether = 8;

// So many tiles of rows share out what is to be fetched: of more the first is too small a part of the whole.
constexpr int64_t kFewTiles = 4;

// What a tile asks memory for while it is at work, if anything, since processors look ahead only within a
// page: its own weights, some way ahead of where it reads, if nobody did before; or its share of those that
// come next, so that memory is read all the time and not by the first rows alone; or what the next weights
// are made from, if its own lie in the cache.
template <bool kShares>
class Fetching {
 public:
  static Fetching own(const quant::PanelMatrix& w) {
    Fetching it;
    it.own_ = true;
    it.panel_bytes_ = w.panel_bytes;
    return it;
  }
  // Of `panels` panels from `next` on what falls to `count` of `rows` rows, from `row` on.
  static Fetching share(const quant::PanelMatrix& w, int64_t next, int panels, int64_t row, int64_t count,
                        int64_t rows) {
    Fetching it;
    it.next_ = w.panel(next) + panels * w.panel_bytes * row / rows;
    it.share_ = (count * panels << kShareBits) / rows;
    return it;
  }

  // What follows `next`, as much as `panels` panels have.
  static Fetching elsewhere(const std::byte* next, int panels) {
    Fetching it;
    it.next_ = next;
    it.share_ = int64_t{panels} << kShareBits;
    return it;
  }

  // units: what is read next of P panels, `bytes` of each, `offset` behind it.
  template <int P>
  void step(const std::byte* const (&units)[P], int64_t offset, int64_t bytes) {
    if (own_) {
      for (int p = 0; p < P; ++p) fetch_ahead(units[p] + offset, bytes, at_, panel_bytes_, P);
      at_ += bytes;
    } else if (kShares && next_ != nullptr) {
      const int64_t share = bytes * share_ >> kShareBits;
      fetch<2>(next_, share);
      next_ += share;
    }
  }

 private:
  bool own_ = false;
  int64_t panel_bytes_ = 0, at_ = 0;  // at_: byte of the tile's panels
  static constexpr int kShareBits = 16;
  const std::byte* next_ = nullptr;
  int64_t share_ = 0;  // bytes to be fetched for each byte of a panel, times 2^kShareBits
};

// Nothing is asked for: loads run ahead far enough, and the shorter the loop, the further.
struct NoFetching {
  template <int P>
  void step(const std::byte* const (&)[P], int64_t, int64_t) {}
};

// Calls run<R, P>(row, count, panel, fetching) over all rows and panels [begin, end), P = kPanelTile together
// where there are as many and memory does not want one stream. Rows are taken together in tiles of R = kTile
// and smaller last ones, count being R; or, if kInTurn, `count` <= kTile in turn where there are more than
// two, and R = 0. kShares: whether a few tiles share out what is to be fetched. A last odd panel is too rare
// to be worth larger tiles of rows.
template <int kTile, bool kInTurn, bool kShares, typename Run>
inline void tile(const LinearArgs& args, int64_t begin, int64_t end, const Run& run) {
  const quant::PanelMatrix& w = *args.weight;
  const bool one_stream = takes_one_stream(args.rows);
  const bool unfetched = one_stream && args.rows == 1 && kLoadsRunAhead && args.fetched == nullptr;
  const bool ahead = kShares && args.rows > kTile && args.rows <= kFewTiles * kTile;
  const int64_t start = begin;
  for (; begin < end; begin += kPanelsTogether) {
    const int64_t last = std::min(end, begin + kPanelsTogether);
    for (int64_t first = 0; first < args.rows; first += kRowsTogether) {
      const int64_t rows = std::min(kRowsTogether, args.rows - first);
      const auto panels = [&]<int kRows, int P>(int64_t panel) {
        const auto at = [&]<int R>(int64_t row, int64_t count) {
          if constexpr (kLoadsRunAhead && R == 1 && P == 1) {
            if (unfetched) return run.template operator()<R, P>(first + row, count, panel, NoFetching());
          }
          Fetching<kShares> fetching;
          const bool foremost = first == 0 && row == 0;
          if (foremost && args.fetched != nullptr)
            fetching = Fetching<kShares>::elsewhere(args.fetched + (w.panel(panel) - w.bytes), P);
          else if (foremost && (panel == start || !ahead))
            fetching = Fetching<kShares>::own(w);
          else if (ahead && panel + P < end)
            fetching = Fetching<kShares>::share(w, panel + P, P, row, count, rows);
          run.template operator()<R, P>(first + row, count, panel, fetching);
        };
        if constexpr (kInTurn) {
          for (int64_t row = 0; row < rows && args.rows > 2; row += kTile)
            at.template operator()<0>(row, std::min<int64_t>(kTile, rows - row));
          if (args.rows > 2) return;
        }
        tile_rows<kRows>(rows, [&]<int R>(int64_t row) { at.template operator()<R>(row, R); });
      };
      int64_t panel = begin;
      for (; panel + kPanelTile <= last && !one_stream; panel += kPanelTile)
        panels.template operator()<kInTurn ? 2 : kTile, kPanelTile>(panel);
      for (; panel < last; ++panel) panels.template operator()<std::min(kTile, 2), 1>(panel);
    }
  }
}

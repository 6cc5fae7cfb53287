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

// What is at work at once: rows whose activations fit the second cache, while so many panels pass by, which
// stay in it for the rows that follow.
constexpr int64_t kRowsTogether = 128;
constexpr int64_t kPanelsTogether = 8;

// Calls run<R, P>(row, panel) over all rows and panels [begin, end), P = kPanelTile together where there are
// as many and memory does not want one stream. A last odd panel is too rare to be worth tiles of rows.
template <int kTile, typename Run>
inline void tile(const LinearArgs& args, int64_t begin, int64_t end, const Run& run) {
  const bool one_stream = kOneStream && args.rows == 1;
  for (; begin < end; begin += kPanelsTogether) {
    const int64_t last = std::min(end, begin + kPanelsTogether);
    for (int64_t first = 0; first < args.rows; first += kRowsTogether) {
      const int64_t rows = std::min(kRowsTogether, args.rows - first);
      int64_t panel = begin;
      for (; panel + kPanelTile <= last && !one_stream; panel += kPanelTile) {
        tile_rows<kTile>(
            rows, [&]<int R>(int64_t row) { run.template operator()<R, kPanelTile>(first + row, panel); });
      }
      for (; panel < last; ++panel) {
        tile_rows<1>(rows, [&]<int R>(int64_t row) { run.template operator()<R, 1>(first + row, panel); });
      }
    }
  }
}

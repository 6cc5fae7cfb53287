// Products of many rows: blocks of weights are unpacked once for all of them. A source says what an unpacked
// block of 32 columns is, `kBytes` long, and multiplies rows with it:
//   take(args, block, blocks, row)        from where on blocks and rows are at work next
//   make(args, panel, block, out)         unpacks one block
//   rows<R, P>(args, panels, row, sums)   sums += those blocks of P panels times R of those rows, by
//                                         ascending columns
// What is at work at once: up to `kTogether` blocks, which with the activations of a few rows fit the nearest
// cache; rows whose activations in these columns fit the next one, while panels pass by.

// Sums of some rows of the first of several panels: 16 of panel p and row r lie at(p, r).
struct Sums {
  float* first;
  int64_t panel_stride;

  float* at(int64_t panel, int64_t row) const { return first + panel * panel_stride + row * kLanes; }
};

// Panels [begin, end), at most kPanelsTogether, times rows [row, row + rows), at most kRowsTogether.
template <int kTile, typename Source>
void unpacked_tile(const LinearArgs& args, Source& source, int64_t begin, int64_t end, int64_t row,
                   int64_t rows) {
  const quant::PanelMatrix& w = *args.weight;
  alignas(64) std::byte unpacked[kPanelTile][Source::kTogether * Source::kBytes];
  alignas(64) float buffer[kPanelsTogether * kRowsTogether * kLanes];  // [panels, rows, 16]
  const Sums sums{buffer, rows * kLanes};
  const int64_t count = (w.columns + 31) / 32;
  const int64_t block_bytes = w.panel_bytes / count;  // about
  const int64_t passes = (count + Source::kTogether - 1) / Source::kTogether;
  const int64_t together = (count + passes - 1) / passes;
  for (int64_t b = 0; b < count; b += together) {
    const int64_t blocks = std::min(together, count - b);
    source.take(args, b, blocks, row);
    const auto multiply = [&]<int P, int kRows>(int64_t panel) {
      // What comes next: the same columns of the panels that follow, or further columns of the first.
      const bool more = panel + P < end;
      const int64_t next_panel = more ? panel + P : begin, next_block = more ? b : b + together;
      const std::byte* panels[P];
      for (int p = 0; p < P; ++p) {
        panels[p] = unpacked[p];
        for (int64_t i = 0; i < blocks; ++i) {
          fetch<2>(w.panel(next_panel + p) + (next_block + i) * block_bytes, block_bytes);
          source.make(args, panel + p, b + i, unpacked[p] + i * Source::kBytes);
        }
      }
      tile_rows<kRows>(rows, [&]<int R>(int64_t r) {
        const Sums tile{sums.at(panel - begin, r), sums.panel_stride};
        const bool first = b == 0, last = b + blocks == count;
        for (int i = 0; i < R && last; ++i) fetch_outputs(args, panel, P, row + r + i);
        for (int i = 0; i < R && first; ++i) {
          for (int p = 0; p < P; ++p) store(tile.at(p, i), load_outputs(args, panel + p, row + r + i));
        }
        source.template rows<R, P>(args, panels, r, tile);
        for (int i = 0; i < R && last; ++i) {
          for (int p = 0; p < P; ++p) store_outputs(args, panel + p, row + r + i, load(tile.at(p, i)));
        }
      });
    };
    int64_t panel = begin;
    for (; panel + kPanelTile <= end; panel += kPanelTile)
      multiply.template operator()<kPanelTile, kTile>(panel);
    for (; panel < end; ++panel) multiply.template operator()<1, 1>(panel);
  }
}

// The same for any number of both.
template <int kTile, typename Source>
void multiply_unpacked(const LinearArgs& args, Source source, int64_t begin, int64_t end) {
  for (; begin < end; begin += kPanelsTogether) {
    const int64_t last = std::min(end, begin + kPanelsTogether);
    for (int64_t row = 0; row < args.rows; row += kRowsTogether)
      unpacked_tile<kTile>(args, source, begin, last, row, std::min(kRowsTogether, args.rows - row));
  }
}

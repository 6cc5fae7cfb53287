// Products of rows of activations with panels of weights. The arithmetic of an output does not
// depend on how many rows are computed together.

// A few rows: weights are widened as they come.
template <typename Format, int R, int P>
void plain_rows(const LinearArgs& args, int64_t panel, int64_t row, auto fetching) {
  const std::byte* at[P];
  for (int p = 0; p < P; ++p) at[p] = args.weight->panel(panel + p);
  const float* x = args.x + row * args.x_stride;
  F acc[P][R];
  LOCKSTEP_UNROLL_SUMS
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) acc[p][r] = zero();
  }
  const auto column = [&](int64_t k, const F(&weights)[P]) {
    for (int r = 0; r < R; ++r) {
      const F value = set1(x[r * args.x_stride + k]);
      for (int p = 0; p < P; ++p) acc[p][r] = fma(weights[p], value, acc[p][r]);
    }
  };
  for (int64_t k = 0; k < args.weight->columns; k += Format::kColumns) {
    fetching.step(at, 0, Format::kBytes);
    F weights[Format::kColumns][P];
    for (int p = 0; p < P; ++p) {
      for (int i = 0; i < Format::kColumns; ++i) weights[i][p] = Format::column(at[p], i);
      at[p] += Format::kBytes;
    }
    for (int i = 0; i < Format::kColumns; ++i) {
      // Only the last unit of an odd number of columns ends before its second.
      if (i == 0 || k + i < args.weight->columns) column(k + i, weights[i]);
    }
  }
  LOCKSTEP_UNROLL_SUMS
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store_outputs(args, panel + p, row + r, acc[p][r]);
  }
}

// sums += P panels of f32 columns times R rows from x on.
template <int R, int P>
[[gnu::noinline]] void float_rows(const std::byte* (&panels)[P], int64_t columns, const float* x,
                                  int64_t x_stride, const Sums& sums) {
  F acc[P][R];
  LOCKSTEP_UNROLL_SUMS
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) acc[p][r] = load(sums.at(p, r));
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < columns; ++k) {
    F weights[P];
    for (int p = 0; p < P; ++p) weights[p] = load(reinterpret_cast<const float*>(panels[p]) + k * kLanes);
    for (int r = 0; r < R; ++r) {
      const F value = set1(x[r * x_stride + k]);
      for (int p = 0; p < P; ++p) acc[p][r] = fma(weights[p], value, acc[p][r]);
    }
  }
  LOCKSTEP_UNROLL_SUMS
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store(sums.at(p, r), acc[p][r]);
  }
}

// What `multiply_unpacked` takes: weights in f32, a block being 32 columns of 16.
struct FloatSource {
  static constexpr int64_t kBytes = 32 * kLanes * sizeof(float);
  static constexpr int64_t kTogether = 8 / kPanelTile;
  const float* x = nullptr;  // of what is at work
  int64_t columns = 0;

  void take(const LinearArgs& args, int64_t index, int64_t blocks, int64_t row) {
    x = args.x + row * args.x_stride + 32 * index;
    columns = std::min(32 * blocks, args.weight->columns - 32 * index);
  }
  template <int R, int P>
  void rows(const LinearArgs& args, const std::byte* (&panels)[P], int64_t row, const Sums& sums) const {
    float_rows<R>(panels, columns, x + row * args.x_stride, args.x_stride, sums);
  }
};

template <typename Format>
struct PlainSource : FloatSource {
  static void make(const LinearArgs& args, int64_t panel, int64_t index, std::byte* block) {
    auto* out = reinterpret_cast<float*>(block);
    const std::byte* at = args.weight->panel(panel) + 32 * index / Format::kColumns * Format::kBytes;
    const int64_t columns = std::min<int64_t>(32, args.weight->columns - 32 * index);
    for (int64_t k = 0; k < columns; k += Format::kColumns, at += Format::kBytes) {
      for (int i = 0; i < Format::kColumns; ++i) store(out + (k + i) * kLanes, Format::column(at, i));
    }
  }
};

// Every weight is dequantised as the reference does it.
template <typename Format>
struct BlockSource : FloatSource {
  static void make(const LinearArgs& args, int64_t panel, int64_t index, std::byte* block) {
    const quant::PanelMatrix& w = *args.weight;
    const int64_t sub_blocks = Format::sub_blocks(w);
    const int64_t s = index % sub_blocks;
    const std::byte* unit = w.panel(panel) + index / sub_blocks * Format::unit_bytes(w);
    const std::byte* codes = Format::codes(unit, w, s);
    auto* out = reinterpret_cast<float*>(block);
    constexpr int kScales = 32 / Format::kScaleColumns;
    for (int part = 0; part < kScales; ++part) {
      const F scale = Format::scale(unit, s * kScales + part);
      [[maybe_unused]] const F bias = Format::bias(unit, s);
      for (int j = part * 8 / kScales; j < (part + 1) * 8 / kScales; ++j) {
        const B quad = quad_codes<Format::kBits>(codes, j);
        for (int i = 0; i < 4; ++i, out += kLanes) {
          F weight = quad_column(quad, i);
          if constexpr (Format::kOffset != 0) weight = weight - set1(Format::kOffset);
          weight = weight * scale;
          if constexpr (Format::kHasBias) weight = weight + bias;
          store(out, weight);
        }
      }
    }
  }
};

template <typename Format>
void plain_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  if (args.many) return multiply_unpacked<kRowTile>(args, PlainSource<Format>(), begin, end);
  tile<kRowTile, false, false>(args, begin, end,
                               [&]<int R, int P>(int64_t row, int64_t, int64_t panel, const auto& fetching) {
                                 plain_rows<Format, R, P>(args, panel, row, fetching);
                               });
}

void linear_f32(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.weight->dtype) {
    case DType::f32: return plain_panels<PlainF32>(args, begin, end);
    case DType::f16: return plain_panels<PlainF16>(args, begin, end);
    case DType::bf16: return plain_panels<PlainBf16>(args, begin, end);
    default:
      with_block_format(*args.weight, [&]<typename Format>() {
        multiply_unpacked<kRowTile>(args, BlockSource<Format>(), begin, end);
      });
  }
}

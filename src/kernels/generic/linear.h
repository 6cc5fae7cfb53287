// Products of rows of activations with panels of weights. The arithmetic of an output does not
// depend on how many rows are computed together.

// acc[r] += x[r, column] * weight, for one column of 16 weights.
template <int R>
inline void multiply_column(F (&acc)[R], F weight, const float* x, int64_t x_stride) {
  for (int r = 0; r < R; ++r) acc[r] = fma(weight, set1(x[r * x_stride]), acc[r]);
}

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

template <typename Format, int R, int P>
void plain_rows(const LinearArgs& args, int64_t panel, int64_t row) {
  const std::byte* at[P];
  for (int p = 0; p < P; ++p) at[p] = args.weight->panel(panel + p);
  const float* x = args.x + row * args.x_stride;
  F acc[P][R];
  for (auto& rows : acc) {
    for (auto& a : rows) a = zero();
  }
  const auto column = [&](int64_t k, const F(&weights)[P]) {
    for (int r = 0; r < R; ++r) {
      const F value = set1(x[r * args.x_stride + k]);
      for (int p = 0; p < P; ++p) acc[p][r] = fma(weights[p], value, acc[p][r]);
    }
  };
  for (int64_t k = 0; k < args.weight->columns; k += Format::kColumns) {
    F weights[Format::kColumns][P];
    for (int p = 0; p < P; ++p) {
      if (row == 0)
        fetch_ahead(at[p], Format::kBytes, at[p] - args.weight->panel(panel + p), args.weight->panel_bytes,
                    P);
      for (int i = 0; i < Format::kColumns; ++i) weights[i][p] = Format::column(at[p], i);
      at[p] += Format::kBytes;
    }
    for (int i = 0; i < Format::kColumns; ++i) {
      // Only the last unit of an odd number of columns ends before its second.
      if (i == 0 || k + i < args.weight->columns) column(k + i, weights[i]);
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store_outputs(args, panel + p, row + r, acc[p][r]);
  }
}

// f32 products on block formats: every weight is dequantised as the reference does it.
template <typename Format, int R>
void dequantised_rows(const LinearArgs& args, int64_t panel, int64_t row) {
  const quant::PanelMatrix& w = *args.weight;
  const std::byte* unit = w.panel(panel);
  const float* x = args.x + row * args.x_stride;
  const int64_t sub_blocks = Format::sub_blocks(w);
  const int64_t unit_bytes = Format::unit_bytes(w);
  const F offset = set1(Format::kOffset);
  constexpr int kScales = 32 / Format::kScaleColumns;
  F acc[R];
  for (auto& a : acc) a = zero();
  for (int64_t k = 0; k < w.columns; unit += unit_bytes) {
    for (int64_t s = 0; s < sub_blocks; ++s, k += 32) {
      const std::byte* codes = Format::codes(unit, w, s);
      for (int part = 0; part < kScales; ++part) {
        const F scale = Format::scale(unit, s * kScales + part);
        [[maybe_unused]] const F bias = Format::bias(unit, s);
        for (int j = part * 8 / kScales; j < (part + 1) * 8 / kScales; ++j) {
          const B quad = quad_codes<Format::kBits>(codes, j);
          for (int i = 0; i < 4; ++i) {
            F weight = quad_column(quad, i);
            if constexpr (Format::kOffset != 0) weight = weight - offset;
            weight = weight * scale;
            if constexpr (Format::kHasBias) weight = weight + bias;
            multiply_column<R>(acc, weight, x + k + 4 * j + i, args.x_stride);
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) store_outputs(args, panel, row + r, acc[r]);
}

// Where an activation block has its planes, scales and sums for a part of a block that has one weight scale.
struct WideBlock {
  using Block = Fixed16;
  static constexpr int kPlanes = 2;
  static constexpr int kScales = 1;  // a block
  static const int8_t* plane(const Fixed16& x, int i) { return i == 0 ? x.high : x.low; }
  static float scale(const Fixed16& x, int) { return x.scale; }
  static int32_t minus_sum(const Fixed16& x, int part, int parts) {
    return x.minus_sum[parts == 2 ? part : 2];
  }
};
struct NarrowBlock {
  using Block = Fixed8;
  static constexpr int kPlanes = 1;
  static constexpr int kScales = 2;
  static const int8_t* plane(const Fixed8& x, int) { return x.high; }
  static float scale(const Fixed8& x, int part) { return x.scale[part]; }
  static int32_t minus_sum(const Fixed8& x, int part, int) { return x.minus_sum[part]; }
};

// sums += integer sums of codes times activations over `kQuads` quads from quad `first`, for P panels and R
// rows.
template <typename Wide, int kBits, int kQuads, int R, int P>
inline void code_sums(I (&sums)[P][R], const std::byte* const (&codes)[P], int first,
                      const typename Wide::Block* const (&x)[R]) {
  // Codes of eight bits may have to be split where a pair of products must fit 16 bits.
  constexpr bool kSplit = kBits == 8 && kSplitBytes;
  constexpr int kParts = kSplit ? 2 : 1;
  constexpr int kPlanes = Wide::kPlanes;
  constexpr int kRun = kSplit ? kQuads : dot_run(kBits) < kQuads ? dot_run(kBits) : kQuads;
  for (int run = first; run < first + kQuads; run += kRun) {
    Dot dots[P][R][kParts][kPlanes];
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) {
        for (int part = 0; part < kParts; ++part) {
          for (int plane = 0; plane < kPlanes; ++plane) {
            // The last plane is the lowest: where dots are integers, its sum starts from what is there.
            const bool starts = kDotsAreInts && plane == kPlanes - 1;
            dots[p][r][part][plane] = starts ? dot_start(sums[p][r]) : dot_zero();
          }
        }
      }
    }
    for (int j = run; j < run + kRun; ++j) {
      B quads[P][kParts];
      for (int p = 0; p < P; ++p) {
        quads[p][0] = quad_codes<kBits>(codes[p], j);
        if constexpr (kSplit) {
          quads[p][1] = (quads[p][0] >> 4) & 0x0F;
          quads[p][0] = quads[p][0] & 0x0F;
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int plane = 0; plane < kPlanes; ++plane) {
          const B quad = broadcast_quad(Wide::plane(*x[r], plane) + 4 * j);
          for (int p = 0; p < P; ++p) {
            for (int part = 0; part < kParts; ++part)
              dots[p][r][part][plane] = dot(dots[p][r][part][plane], quads[p][part], quad);
          }
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) {
        I total = kDotsAreInts ? int_zero() : sums[p][r];
        for (int part = 0; part < kParts; ++part) {
          I sum = dot_sum(dots[p][r][part][kPlanes - 1]);
          if constexpr (kPlanes == 2) sum = sum + shift_left(dot_sum(dots[p][r][part][0]), 8);
          total = total + (part == 0 ? sum : shift_left(sum, 4));
        }
        sums[p][r] = total;
      }
    }
  }
}

// acc += one block of weights times activations.
template <typename Format, typename Wide, int R, int P>
inline void multiply_block(F (&acc)[P][R], const quant::PanelMatrix& w, const std::byte* const (&units)[P],
                           int64_t s, const typename Wide::Block* const (&x)[R]) {
  constexpr int kWeightScales = 32 / Format::kScaleColumns;
  constexpr int kParts = kWeightScales > Wide::kScales ? kWeightScales : Wide::kScales;
  const std::byte* codes[P];
  for (int p = 0; p < P; ++p) codes[p] = Format::codes(units[p], w, s);
  F together[P][R];  // of the halves of a block, where the weights have one scale
  for (int part = 0; part < kParts; ++part) {
    I sums[P][R];
    for (int r = 0; r < R; ++r) {
      const I start = Format::kOffset == 0 ? int_zero()
                                           : shift_left(set1_int(Wide::minus_sum(*x[r], part, kParts)),
                                                        log2_of(Format::kOffset));
      for (int p = 0; p < P; ++p) sums[p][r] = start;
    }
    code_sums<Wide, Format::kBits, 8 / kParts>(sums, codes, part * 8 / kParts, x);
    F scales[P];
    for (int p = 0; p < P; ++p)
      scales[p] = Format::scale(units[p], s * kWeightScales + (kWeightScales == 2 ? part : 0));
    for (int r = 0; r < R; ++r) {
      const F x_scale = set1(Wide::scale(*x[r], part));
      for (int p = 0; p < P; ++p) {
        const F sum = to_float(sums[p][r]);
        if constexpr (kParts == kWeightScales) {
          acc[p][r] = fma(sum, scales[p] * x_scale, acc[p][r]);
        } else {
          together[p][r] = part == 0 ? sum * x_scale : fma(sum, x_scale, together[p][r]);
          if (part == kParts - 1) acc[p][r] = fma(together[p][r], scales[p], acc[p][r]);
        }
      }
    }
  }
  if constexpr (Format::kHasBias) {
    F biases[P];
    for (int p = 0; p < P; ++p) biases[p] = Format::minus_bias(units[p], s);
    for (int r = 0; r < R; ++r) {
      const F total = set1(x[r]->minus_total);  // negative as the bias is
      for (int p = 0; p < P; ++p) acc[p][r] = fma(biases[p], total, acc[p][r]);
    }
  }
}

template <typename Format, typename Wide, int R, int P>
void fixed_rows(const LinearArgs& args, const typename Wide::Block* first, int64_t panel, int64_t row) {
  const quant::PanelMatrix& w = *args.weight;
  const int64_t sub_blocks = Format::sub_blocks(w);
  const int64_t unit_bytes = Format::unit_bytes(w);
  const int64_t step = unit_bytes / sub_blocks;
  const std::byte* units[P];
  for (int p = 0; p < P; ++p) units[p] = w.panel(panel + p);
  const typename Wide::Block* x[R];
  for (int r = 0; r < R; ++r) x[r] = first + (row + r) * args.x_stride;
  const auto* end = x[0] + args.x_stride;
  F acc[P][R];
  for (auto& rows : acc) {
    for (auto& a : rows) a = zero();
  }
  int64_t at = 0;  // byte of the panels
  while (x[0] != end) {
    // As short a loop as possible: unrolled, its instructions would no longer come from the cache of decoded
    // ones.
#pragma GCC unroll 1
    for (int64_t s = 0; s < sub_blocks; ++s) {
      // The first rows bring the weights from memory, which processors fetch ahead only within a page.
      if (row == 0) {
        for (int p = 0; p < P; ++p) fetch_ahead(units[p] + s * step, step, at, w.panel_bytes, P);
        at += step;
      }
      multiply_block<Format, Wide>(acc, w, units, s, x);
      for (int r = 0; r < R; ++r) ++x[r];
    }
    for (int p = 0; p < P; ++p) units[p] += unit_bytes;
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store_outputs(args, panel + p, row + r, acc[p][r]);
  }
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

// Calls run<R, P>(row, panel) over all rows and panels [begin, end), P = kPanelTile together where there are
// as many. A last odd panel is too rare to be worth tiles of rows.
template <int kTile, typename Run>
inline void tile(const LinearArgs& args, int64_t begin, int64_t end, const Run& run) {
  int64_t panel = begin;
  for (; panel + kPanelTile <= end; panel += kPanelTile) {
    tile_rows<kTile>(args.rows,
                     [&]<int R>(int64_t row) { run.template operator()<R, kPanelTile>(row, panel); });
  }
  for (; panel < end; ++panel) {
    tile_rows<1>(args.rows, [&]<int R>(int64_t row) { run.template operator()<R, 1>(row, panel); });
  }
}

template <typename Format>
void plain_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  tile<kRowTile>(args, begin, end, [&]<int R, int P>(int64_t row, int64_t panel) {
    plain_rows<Format, R, P>(args, panel, row);
  });
}
template <typename Format>
void dequantised_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    tile_rows<kRowTile>(args.rows,
                        [&]<int R>(int64_t row) { dequantised_rows<Format, R>(args, panel, row); });
  }
}
template <typename Format, typename Wide>
void fixed_panels(const LinearArgs& args, const typename Wide::Block* x, int64_t begin, int64_t end) {
  tile<kRowTileFixed>(args, begin, end, [&]<int R, int P>(int64_t row, int64_t panel) {
    fixed_rows<Format, Wide, R, P>(args, x, panel, row);
  });
}

// Calls run<Format>() for the block format of a matrix.
template <typename Run>
inline void with_block_format(const quant::PanelMatrix& w, const Run& run) {
  const auto affine = [&]<int kBits>() {
    switch (w.scale_dtype) {
      case DType::f16: return run.template operator()<Affine<kBits, ScaleF16>>();
      case DType::bf16: return run.template operator()<Affine<kBits, ScaleBf16>>();
      default: return run.template operator()<Affine<kBits, ScaleF32>>();
    }
  };
  switch (w.dtype) {
    case DType::q4_0: return run.template operator()<Simple<4, 8, false>>();
    case DType::q4_1: return run.template operator()<Simple<4, 0, true>>();
    case DType::q5_0: return run.template operator()<Simple<5, 16, false>>();
    case DType::q5_1: return run.template operator()<Simple<5, 0, true>>();
    case DType::q8_0: return run.template operator()<Simple<8, 128, false>>();
    case DType::q4_k: return run.template operator()<SuperBlock<4>>();
    case DType::q5_k: return run.template operator()<SuperBlock<5>>();
    case DType::q6_k: return run.template operator()<Q6K>();
    case DType::mlx_q4: return affine.template operator()<4>();
    case DType::mlx_q8: return affine.template operator()<8>();
    default: return;
  }
}

void linear_f32(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.weight->dtype) {
    case DType::f32: return plain_panels<PlainF32>(args, begin, end);
    case DType::f16: return plain_panels<PlainF16>(args, begin, end);
    case DType::bf16: return plain_panels<PlainBf16>(args, begin, end);
    default:
      with_block_format(*args.weight,
                        [&]<typename Format>() { dequantised_panels<Format>(args, begin, end); });
  }
}

void linear_fixed16(const LinearArgs& args, int64_t begin, int64_t end) {
  with_block_format(*args.weight, [&]<typename Format>() {
    fixed_panels<Format, WideBlock>(args, args.x_fixed16, begin, end);
  });
}
void linear_fixed8(const LinearArgs& args, int64_t begin, int64_t end) {
  with_block_format(*args.weight, [&]<typename Format>() {
    fixed_panels<Format, NarrowBlock>(args, args.x_fixed8, begin, end);
  });
}

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

template <typename Format, int R>
void plain_rows(const LinearArgs& args, int64_t panel, int64_t row) {
  const std::byte* p = args.weight->panel(panel);
  const float* x = args.x + row * args.x_stride;
  F acc[R];
  for (auto& a : acc) a = zero();
  for (int64_t k = 0; k < args.weight->columns; ++k, p += Format::kBytes) {
    multiply_column<R>(acc, Format::get(p), x + k, args.x_stride);
  }
  for (int r = 0; r < R; ++r) store_outputs(args, panel, row + r, acc[r]);
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

// Integer sum of codes * (256 * high + low) over `kQuads` quads from quad `first`.
template <int kBits, int kQuads, int R>
inline void code_sums(I (&sums)[R], const std::byte* codes, int first, const Fixed16& x, int64_t row,
                      int64_t column) {
  if constexpr (kBits == 8 && kSplitBytes) {
    Dot dots[R][4];
    for (auto& d : dots) d[0] = d[1] = d[2] = d[3] = dot_zero();
    for (int j = first; j < first + kQuads; ++j) {
      const B quad = quad_codes<8>(codes, j);
      const B low = quad & 0x0F;
      const B high = (quad >> 4) & 0x0F;
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * x.blocks * 32 + column + 4 * j;
        dots[r][0] = dot(dots[r][0], low, x.low + at);
        dots[r][1] = dot(dots[r][1], low, x.high + at);
        dots[r][2] = dot(dots[r][2], high, x.low + at);
        dots[r][3] = dot(dots[r][3], high, x.high + at);
      }
    }
    for (int r = 0; r < R; ++r) {
      const I low = dot_sum(dots[r][0]) + shift_left(dot_sum(dots[r][1]), 8);
      const I high = dot_sum(dots[r][2]) + shift_left(dot_sum(dots[r][3]), 8);
      sums[r] = low + shift_left(high, 4);
    }
  } else {
    constexpr int kRun = dot_run(kBits) < kQuads ? dot_run(kBits) : kQuads;
    for (auto& s : sums) s = int_zero();
    for (int run = first; run < first + kQuads; run += kRun) {
      Dot dots[R][2];
      for (auto& d : dots) d[0] = d[1] = dot_zero();
      for (int j = run; j < run + kRun; ++j) {
        const B quad = quad_codes<kBits>(codes, j);
        for (int r = 0; r < R; ++r) {
          const int64_t at = (row + r) * x.blocks * 32 + column + 4 * j;
          dots[r][0] = dot(dots[r][0], quad, x.low + at);
          dots[r][1] = dot(dots[r][1], quad, x.high + at);
        }
      }
      for (int r = 0; r < R; ++r) {
        sums[r] = sums[r] + dot_sum(dots[r][0]) + shift_left(dot_sum(dots[r][1]), 8);
      }
    }
  }
}

template <typename Format, int R>
void fixed16_rows(const LinearArgs& args, int64_t panel, int64_t row) {
  const quant::PanelMatrix& w = *args.weight;
  const Fixed16& x = args.fixed;
  const std::byte* unit = w.panel(panel);
  const int64_t sub_blocks = Format::sub_blocks(w);
  const int64_t unit_bytes = Format::unit_bytes(w);
  constexpr int kScales = 32 / Format::kScaleColumns;
  constexpr int kQuads = 8 / kScales;
  F acc[R];
  for (auto& a : acc) a = zero();
  for (int64_t block = 0; block < x.blocks; unit += unit_bytes) {
    for (int64_t s = 0; s < sub_blocks; ++s, ++block) {
      const std::byte* codes = Format::codes(unit, w, s);
      for (int part = 0; part < kScales; ++part) {
        const F scale = Format::scale(unit, s * kScales + part);
        I sums[R];
        code_sums<Format::kBits, kQuads, R>(sums, codes, part * kQuads, x, row, block * 32);
        for (int r = 0; r < R; ++r) {
          const int64_t at = (row + r) * x.blocks + block;
          const int32_t x_sum = kScales == 2 ? x.sum[2 * at + part] : x.sum[2 * at] + x.sum[2 * at + 1];
          if constexpr (Format::kOffset != 0) sums[r] = sums[r] - set1_int(Format::kOffset * x_sum);
          acc[r] = fma(to_float(sums[r]), scale * set1(x.scale[at]), acc[r]);
          if constexpr (Format::kHasBias) {
            const float total = x.scale[at] * static_cast<float>(x_sum);
            acc[r] = fma(Format::bias(unit, s), set1(total), acc[r]);
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) store_outputs(args, panel, row + r, acc[r]);
}

// Calls rows<R>(panel, row) over all rows, in tiles of R = kTile and a smaller last one.
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

template <typename Format>
void plain_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    tile_rows<kRowTile>(args.rows, [&]<int R>(int64_t row) { plain_rows<Format, R>(args, panel, row); });
  }
}
template <typename Format>
void dequantised_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    tile_rows<kRowTile>(args.rows,
                        [&]<int R>(int64_t row) { dequantised_rows<Format, R>(args, panel, row); });
  }
}
template <typename Format>
void fixed16_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    tile_rows<kRowTileFixed>(args.rows,
                             [&]<int R>(int64_t row) { fixed16_rows<Format, R>(args, panel, row); });
  }
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
  with_block_format(*args.weight, [&]<typename Format>() { fixed16_panels<Format>(args, begin, end); });
}

// Products of rows of fixed-point activations with panels of stored codes. Integers are summed within a
// block, which is exact in any order, so that each ISA may multiply them as suits it (`ByteProducts`,
// `WideProducts`, and those of many rows); what is f32 has one order everywhere.

// Activations of 16 bits: as planes of bytes, or as words where the ISA multiplies those.
struct Wide {
  using Block = Fixed16;
  template <int kBits>
  using Products = std::conditional_t<(kBits <= kFewWideBits), WideProducts, ManyWideProducts>;
  using ManyProducts = ManyWideProducts;
  template <typename Multiplied>
  static constexpr int kPlanes = Multiplied::kWidePlanes;
  static constexpr int kManyTile = kManyTileWide;
  static constexpr bool kManySumsInMemory = kManyWideSumsInMemory;
  static constexpr int kScales = 1;  // a block
  static const int8_t* digits(const Fixed16& x) { return x.digits; }
  static float scale(const Fixed16& x, int) { return x.scale; }
  static int32_t minus_sum(const Fixed16& x, int part, int parts) {
    return x.minus_sum[parts == 2 ? part : 2];
  }
};
// Activations of 8 bits.
struct Narrow {
  using Block = Fixed8;
  template <int>
  using Products = ByteProducts;
  using ManyProducts = ManyByteProducts;
  template <typename>
  static constexpr int kPlanes = 1;
  static constexpr int kManyTile = kManyTileNarrow;
  static constexpr bool kManySumsInMemory = false;
  static constexpr int kScales = 2;
  static const int8_t* digits(const Fixed8& x) { return x.digits; }
  static float scale(const Fixed8& x, int part) { return x.scale[part]; }
  static int32_t minus_sum(const Fixed8& x, int part, int) { return x.minus_sum[part]; }
};

// Parts of a block that have a scale of their own, on either side.
template <typename Format, typename Form>
constexpr int kPartsOf = std::max(32 / Format::kScaleColumns, Form::kScales);

// Codes as they lie in a panel.
template <typename Format, typename Multiplied>
struct Stored : Format {
  using Products = Multiplied;
  using Format::kBits;
  static constexpr int kVectors = Products::kVectors;
  static void quad(const std::byte* codes, int j, B (&vectors)[kVectors]) {
    Products::template split<kBits>(quad_codes<kBits>(codes, j), vectors);
  }
  static I start(const std::byte*, int) { return int_zero(); }
};

// Blocks made ready to be multiplied with many rows: what unpacking takes is done once for all of them. A
// block of 32 columns has its scales, its bias, where digits are unsigned the start of integer sums, and then
// the vectors of its quads, quad after quad. Formats that differ only in how they are stored are the same
// here.
template <typename Multiplied, int kCodeBits, int kCodeOffset, bool kBias, int kColumns, int kParts>
struct Unpacked {
  using Products = Multiplied;
  static constexpr int kBits = kCodeBits;
  static constexpr int kOffset = kCodeOffset;
  static constexpr bool kHasBias = kBias;
  static constexpr int kScaleColumns = kColumns;
  static constexpr int kVectors = Products::kVectors;
  static constexpr int kScales = 32 / kScaleColumns;
  static constexpr int64_t kStarts = 64 * (kScales + (kHasBias ? 1 : 0));  // byte
  static constexpr int64_t kCodes = kStarts + (Products::kUnsignedDigits ? 64 * kParts : 0);
  static constexpr int64_t kBytes = kCodes + 64 * 8 * kVectors;

  static F scale(const std::byte* block, int64_t i) { return load(floats(block + 64 * i)); }
  static F minus_bias(const std::byte* block, int64_t) { return load(floats(block + 64 * kScales)); }
  static I start(const std::byte* block, int part) {
    if constexpr (Products::kUnsignedDigits) return Products::start(block + kStarts + 64 * part);
    return int_zero();
  }
  static const std::byte* codes(const std::byte* block, const quant::PanelMatrix&, int64_t) {
    return block + kCodes;
  }
  static void quad(const std::byte* codes, int j, B (&vectors)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) vectors[i] = load_bytes(codes + 64 * (kVectors * j + i));
  }

  // Block `s` of a unit of a panel.
  template <typename Format>
  static void make(const std::byte* unit, const quant::PanelMatrix& w, int64_t s, std::byte* block) {
    for (int i = 0; i < kScales; ++i) store(floats(block + 64 * i), Format::scale(unit, s * kScales + i));
    if constexpr (kHasBias) store(floats(block + 64 * kScales), Format::minus_bias(unit, s));
    for (int part = 0; part < kParts; ++part) {
      [[maybe_unused]] I start = int_zero();
      for (int j = part * 8 / kParts; j < (part + 1) * 8 / kParts; ++j) {
        B vectors[kVectors];
        Stored<Format, Products>::quad(Format::codes(unit, w, s), j, vectors);
        for (int i = 0; i < kVectors; ++i) {
          if constexpr (kOffset != Format::kOffset)
            vectors[i] = Products::minus(vectors[i], Format::kOffset - kOffset);
          if constexpr (Products::kUnsignedDigits) start = Products::add_raised(start, vectors[i]);
          store_bytes(block + kCodes + 64 * (kVectors * j + i), vectors[i]);
        }
      }
      if constexpr (Products::kUnsignedDigits) Products::store_start(block + kStarts + 64 * part, start);
    }
  }

 private:
  static const float* floats(const std::byte* p) { return reinterpret_cast<const float*>(p); }
  static float* floats(std::byte* p) { return reinterpret_cast<float*>(p); }
};
template <typename Format, typename Form>
using UnpackedOf = Unpacked<typename Form::ManyProducts, Form::ManyProducts::alike(Format::kBits),
                            Format::kOffset - Form::ManyProducts::taken_off(Format::kBits, Format::kOffset),
                            Format::kHasBias, Format::kScaleColumns, kPartsOf<Format, Form>>;

// Integer sums of codes times activations over `kQuads` quads from quad `first`, for P panels and R rows:
// sums[p][r] = start(p, r) + ..., which is asked for where it is needed, for registers are few.
template <typename Codes, typename Form, int kQuads, int R, int P, typename Start>
inline void code_sums(I (&sums)[P][R], const std::byte* const (&codes)[P], int first,
                      const typename Form::Block* const (&x)[R], const Start& start) {
  using Products = typename Codes::Products;
  constexpr int kPlanes = Form::template kPlanes<Products>;
  constexpr int kVectors = Codes::kVectors;
  constexpr int kRun = std::min(Products::run(Codes::kBits), kQuads);
  const auto add = [&]<typename Dots>(int j, int from, int to, const Dots& dot) {
    B vectors[P][kVectors];
    for (int p = 0; p < P; ++p) Codes::quad(codes[p], j, vectors[p]);
    for (int r = 0; r < R; ++r) {
      for (int plane = from; plane < to; ++plane) {
        for (int i = 0; i < kVectors; ++i) {
          const B value = broadcast(Form::digits(*x[r]) + Products::digits_at(j, plane, i));
          for (int p = 0; p < P; ++p)
            dot(p, r, plane) = Products::add(dot(p, r, plane), vectors[p][i], value);
        }
      }
    }
  };
  if constexpr (Products::kChained) {
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) sums[p][r] = start(p, r);
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int p = 0; p < P && plane > 0; ++p) {
        for (int r = 0; r < R; ++r) sums[p][r] = shift_left(sums[p][r], 8);
      }
      for (int j = 0; j < kQuads; ++j)
        add(first + j, plane, plane + 1, [&](int p, int r, int) -> I& { return sums[p][r]; });
    }
  } else {
    for (int run = first; run < first + kQuads; run += kRun) {
      const auto before = [&](int p, int r) { return run == first ? start(p, r) : sums[p][r]; };
      I dots[P][R][kPlanes];
      for (int p = 0; p < P; ++p) {
        for (int r = 0; r < R; ++r) {
          for (int plane = 0; plane < kPlanes; ++plane) {
            // The last plane is the lowest: its sum may go on from what is there.
            const bool goes_on = Products::kGoesOn && plane == kPlanes - 1;
            dots[p][r][plane] = goes_on ? before(p, r) : int_zero();
          }
        }
      }
      for (int j = 0; j < kRun; ++j)
        add(run + j, 0, kPlanes, [&](int p, int r, int plane) -> I& { return dots[p][r][plane]; });
      for (int p = 0; p < P; ++p) {
        for (int r = 0; r < R; ++r) {
          I sum = Products::total(dots[p][r][kPlanes - 1]);
          if constexpr (!Products::kGoesOn) sum = sum + before(p, r);
          if constexpr (kPlanes == 2) sum = sum + Products::high_total(dots[p][r][0]);
          sums[p][r] = sum;
        }
      }
    }
  }
}

// f32 sums of a tile in registers (see LOCKSTEP_UNROLL_SUMS), and left in memory.
template <int P, int R>
struct InRegisters {
  F values[P][R];

  explicit InRegisters(const Sums& sums) {
    LOCKSTEP_UNROLL_SUMS
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) values[p][r] = load(sums.at(p, r));
    }
  }
  void save(const Sums& sums) const {
    LOCKSTEP_UNROLL_SUMS
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) store(sums.at(p, r), values[p][r]);
    }
  }
  F get(int p, int r) const { return values[p][r]; }
  void set(int p, int r, F sum) { values[p][r] = sum; }
};
struct InMemory {
  Sums sums;

  explicit InMemory(const Sums& all) : sums(all) {}
  void save(const Sums&) const {}
  F get(int p, int r) const { return load(sums.at(p, r)); }
  void set(int p, int r, F sum) const { store(sums.at(p, r), sum); }
};

// acc += one block of weights times activations. acc: InRegisters or InMemory.
template <typename Codes, typename Form, int R, int P, typename Acc>
[[gnu::always_inline]] inline void multiply_block(Acc& acc, const quant::PanelMatrix& w,
                                                  const std::byte* const (&units)[P], int64_t s,
                                                  const typename Form::Block* const (&x)[R]) {
  constexpr int kWeightScales = 32 / Codes::kScaleColumns;
  constexpr int kParts = kPartsOf<Codes, Form>;  // as `UnpackedOf` has it
  const std::byte* codes[P];
  for (int p = 0; p < P; ++p) codes[p] = Codes::codes(units[p], w, s);
  F together[P][R];  // of the halves of a block, where the weights have one scale
  const auto multiply_part = [&]<int kPart>() {
    I sums[P][R];
    code_sums<Codes, Form, 8 / kParts>(sums, codes, kPart * 8 / kParts, x, [&](int p, int r) {
      const I start = Codes::start(units[p], kPart);
      if constexpr (Codes::kOffset <= 0) return start;
      return start + shift_left(set1_int(Form::minus_sum(*x[r], kPart, kParts)), log2_of(Codes::kOffset));
    });
    if constexpr (Codes::kOffset < 0) {
      for (int r = 0; r < R; ++r) {
        const I total = shift_left(set1_int(Form::minus_sum(*x[r], kPart, kParts)), log2_of(-Codes::kOffset));
        for (int p = 0; p < P; ++p) sums[p][r] = sums[p][r] - total;
      }
    }
    constexpr bool kLast = kPart == kParts - 1;
    constexpr bool kApart = kParts != kWeightScales;  // the scales of either side
    F scales[P];
    [[maybe_unused]] F biases[P];
    for (int p = 0; p < P; ++p) {
      scales[p] = Codes::scale(units[p], s * kWeightScales + (kWeightScales == 2 ? kPart : 0));
      if constexpr (Codes::kHasBias) biases[p] = Codes::minus_bias(units[p], s);
    }
    for (int r = 0; r < R; ++r) {
      const F x_scale = set1(Form::scale(*x[r], kPart));
      [[maybe_unused]] const F x_total = set1(x[r]->minus_total);  // negative as the bias is
      for (int p = 0; p < P; ++p) {
        const F sum = to_float(sums[p][r]);
        if constexpr (kApart) together[p][r] = kPart == 0 ? sum * x_scale : fma(sum, x_scale, together[p][r]);
        if constexpr (kApart && !kLast) continue;
        F value = kApart ? fma(together[p][r], scales[p], acc.get(p, r))
                         : fma(sum, scales[p] * x_scale, acc.get(p, r));
        if constexpr (Codes::kHasBias && kLast) value = fma(biases[p], x_total, value);
        acc.set(p, r, value);
      }
    }
  };
  multiply_part.template operator()<0>();
  if constexpr (kParts == 2) multiply_part.template operator()<1>();
}

// A few rows: codes are taken as they lie.
template <typename Format, typename Form, int R, int P>
void fixed_rows(const LinearArgs& args, const typename Form::Block* first, int64_t panel, int64_t row,
                const Fetching<Format::kSharesFetching>& what) {
  Fetching fetching = what;
  using Codes = Stored<Format, typename Form::template Products<Format::kBits>>;
  const quant::PanelMatrix& w = *args.weight;
  const int64_t sub_blocks = Format::sub_blocks(w);
  const int64_t unit_bytes = Format::unit_bytes(w);
  const int64_t step = unit_bytes / sub_blocks;
  const std::byte* units[P];
  for (int p = 0; p < P; ++p) units[p] = w.panel(panel + p);
  const typename Form::Block* x[R];
  for (int r = 0; r < R; ++r) x[r] = first + (row + r) * args.x_stride;
  const auto* end = x[0] + w.columns / 32;
  alignas(64) float outputs[P * R * kLanes];  // [P, R, 16]
  const Sums sums{outputs, R * kLanes};
  InMemory acc(sums);
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) acc.set(p, r, load_outputs(args, panel + p, row + r));
  }
  while (x[0] != end) {
    // As short a loop as possible: unrolled, its instructions would no longer come from the cache of decoded
    // ones.
#pragma GCC unroll 1
    for (int64_t s = 0; s < sub_blocks; ++s) {
      fetching.step(units, s * step, step);
      multiply_block<Codes, Form>(acc, w, units, s, x);
      for (int r = 0; r < R; ++r) ++x[r];
    }
    for (int p = 0; p < P; ++p) units[p] += unit_bytes;
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store_outputs(args, panel + p, row + r, load(sums.at(p, r)));
  }
}

// sums += `blocks` unpacked blocks of P panels times R rows. x: the first row's block that belongs to the
// first.
template <typename Codes, typename Form, int R, int P>
[[gnu::noinline]] void unpacked_rows(const LinearArgs& args, const std::byte* (&panels)[P], int64_t blocks,
                                     const typename Form::Block* first, const Sums& sums) {
  const std::byte* units[P];
  for (int p = 0; p < P; ++p) units[p] = panels[p];
  const typename Form::Block* x[R];
  for (int r = 0; r < R; ++r) x[r] = first + r * args.x_stride;
  std::conditional_t<Form::kManySumsInMemory, InMemory, InRegisters<P, R>> acc(sums);
#pragma GCC unroll 1
  for (int64_t b = 0; b < blocks; ++b) {
    multiply_block<Codes, Form>(acc, *args.weight, units, 0, x);
    for (int p = 0; p < P; ++p) units[p] += Codes::kBytes;
    for (int r = 0; r < R; ++r) ++x[r];
  }
  acc.save(sums);
}

// Many rows: blocks are unpacked (`multiply_unpacked`).
template <typename Format, typename Form>
struct FixedSource {
  using Codes = UnpackedOf<Format, Form>;
  static constexpr int64_t kBytes = Codes::kBytes;
  static constexpr int64_t kTogether = 16;

  const typename Form::Block* x;                // activations [T, x_stride]
  const typename Form::Block* first = nullptr;  // of what is at work
  int64_t blocks = 0;

  void take(const LinearArgs& args, int64_t index, int64_t count, int64_t row) {
    first = x + row * args.x_stride + index;
    blocks = count;
  }
  static void make(const LinearArgs& args, int64_t panel, int64_t index, std::byte* block) {
    const int64_t sub_blocks = Format::sub_blocks(*args.weight);
    const std::byte* unit = args.weight->panel(panel) + index / sub_blocks * Format::unit_bytes(*args.weight);
    Codes::template make<Format>(unit, *args.weight, index % sub_blocks, block);
  }
  template <int R, int P>
  void rows(const LinearArgs& args, const std::byte* (&panels)[P], int64_t row, const Sums& sums) const {
    unpacked_rows<Codes, Form, R>(args, panels, blocks, first + row * args.x_stride, sums);
  }
};

template <typename Format, typename Form>
void fixed_panels(const LinearArgs& args, const typename Form::Block* x, int64_t begin, int64_t end) {
  if (args.many) return multiply_unpacked<Form::kManyTile>(args, FixedSource<Format, Form>{x}, begin, end);
  constexpr int kPlanes = Form::template kPlanes<typename Form::template Products<Format::kBits>>;
  constexpr int kTile = kPlanes == 2 ? kRowTilePlanes : kRowTileFixed;
  tile<kTile, Format::kSharesFetching>(args, begin, end,
                                       [&]<int R, int P>(int64_t row, int64_t panel, const auto& fetching) {
                                         fixed_rows<Format, Form, R, P>(args, x, panel, row, fetching);
                                       });
}

void linear_fixed16(const LinearArgs& args, int64_t begin, int64_t end) {
  with_block_format(*args.weight,
                    [&]<typename Format>() { fixed_panels<Format, Wide>(args, args.x_fixed16, begin, end); });
}
void linear_fixed8(const LinearArgs& args, int64_t begin, int64_t end) {
  with_block_format(*args.weight, [&]<typename Format>() {
    if constexpr (Format::kBits <= kNarrowBits) fixed_panels<Format, Narrow>(args, args.x_fixed8, begin, end);
  });
}

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
  template <typename Format>
  static constexpr bool kJoins = false;
  static const int8_t* digits(const Fixed16& x) { return x.digits; }
  static float scale(const Fixed16& x, int) { return x.scale; }
  static float unit(const Fixed16& x) { return x.scale; }
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
  // Whether the sums of both halves of a block are joined in integers.
  template <typename Format>
  static constexpr bool kJoins = Format::kScaleColumns == 32 && kSumsFit16<Format>;
  static const int8_t* digits(const Fixed8& x) { return x.digits; }
  static float scale(const Fixed8& x, int part) { return x.scale[part]; }
  static float unit(const Fixed8& x) { return x.unit; }
  static int32_t minus_sum(const Fixed8& x, int part, int) { return x.minus_sum[part]; }
};

// Parts of a block that have a scale of their own, on either side.
template <typename Format, typename Form>
constexpr int kPartsOf = std::max(32 / Format::kScaleColumns, Form::kScales);

// What `quad` reads of block `s` of several units.
template <typename Codes, size_t P>
inline std::array<const std::byte*, P> blocks_of(const std::byte* const (&units)[P],
                                                 const quant::PanelMatrix& w, int64_t s) {
  std::array<const std::byte*, P> blocks;
  for (size_t p = 0; p < P; ++p) blocks[p] = Codes::codes(units[p], w, s);
  return blocks;
}

// Codes as they lie in a panel.
template <typename Format, typename Form, typename Multiplied>
struct Stored : Format {
  using Products = Multiplied;
  using Format::kBits;
  static constexpr bool kJoins = Form::template kJoins<Format>;
  static constexpr bool kHalvesInTurn = false;
  static F times(F scale, F x_scale) { return scale * x_scale; }
  static constexpr int kVectors = Products::kVectors;
  template <size_t P>
  static std::array<const std::byte*, P> blocks(const std::byte* const (&units)[P],
                                                const quant::PanelMatrix& w, int64_t s) {
    return blocks_of<Format>(units, w, s);
  }
  static void quad(const std::byte* codes, int j, B (&vectors)[kVectors]) {
    Products::template split<kBits>(quad_codes<kBits>(codes, j), vectors);
  }
  static I start(const std::byte*, int) { return int_zero(); }
};

// A block of a panel in registers, while several rows pass by. kPowers: scales times powers of two are sums
// of exponents, which leaves multipliers to other products.
template <typename Format, typename Form, bool kPowers>
struct Held {
  static constexpr bool kAddsExponents = kPowers;
  using In = Stored<Format, Form, typename Form::template Products<Format::kBits>>;
  using Products = typename In::Products;
  static constexpr int kBits = Format::kBits;
  static constexpr int kOffset = Format::kOffset;
  static constexpr bool kHasBias = Format::kHasBias;
  static constexpr int kScaleColumns = Format::kScaleColumns;
  static constexpr int kVectors = In::kVectors;
  static constexpr bool kJoins = In::kJoins;
  static constexpr bool kHalvesInTurn = Form::kScales == 2;  // or sums of a single row would be waited for
  static constexpr int kScales = 32 / kScaleColumns;

  B vectors[8][kVectors];
  F scales[kScales];
  F bias;  // negative

  Held(const std::byte* unit, const quant::PanelMatrix& w, int64_t s) {
    for (int j = 0; j < 8; ++j) {
      In::quad(Format::codes(unit, w, s), j, vectors[j]);
    }
    for (int i = 0; i < kScales; ++i) scales[i] = Format::scale(unit, s * kScales + i);
    if constexpr (kHasBias) bias = Format::minus_bias(unit, s);
  }
  static F scale(const Held& held, int64_t i) { return held.scales[i]; }
  static F times(F scale, F x_scale) { return kPowers ? times_power(scale, x_scale) : scale * x_scale; }
  // Whether scales times powers of two are no sums of exponents.
  bool special() const {
    bool any = false;
    for (const F scale : scales) any = any || any_special(scale);
    return any;
  }
  static F minus_bias(const Held& held, int64_t) { return held.bias; }
  static I start(const Held&, int) { return int_zero(); }
  template <size_t P>
  static auto blocks(const Held (&held)[P], const quant::PanelMatrix&, int64_t) -> const Held (&)[P] {
    return held;
  }
  static void quad(const Held& held, int j, B (&out)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) out[i] = held.vectors[j][i];
  }
};

// Blocks made ready to be multiplied with many rows: what unpacking takes is done once for all of them. A
// block of 32 columns has its scales, its bias, where digits are unsigned the start of integer sums, and then
// the vectors of its quads, quad after quad. Formats that differ only in how they are stored are the same
// here.
template <typename Multiplied, int kCodeBits, int kCodeOffset, bool kBias, int kColumns, int kParts,
          bool kJoinsParts>
struct Unpacked {
  using Products = Multiplied;
  static constexpr bool kJoins = kJoinsParts;
  static constexpr bool kHalvesInTurn = false;
  static F times(F scale, F x_scale) { return scale * x_scale; }
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
  template <size_t P>
  static std::array<const std::byte*, P> blocks(const std::byte* const (&units)[P],
                                                const quant::PanelMatrix& w, int64_t s) {
    return blocks_of<Unpacked>(units, w, s);
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
        Products::template split<Format::kBits>(quad_codes<Format::kBits>(Format::codes(unit, w, s), j),
                                                vectors);
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
using UnpackedOf =
    Unpacked<typename Form::ManyProducts, Form::ManyProducts::alike(Format::kBits),
             Format::kOffset - Form::ManyProducts::taken_off(Format::kBits, Format::kOffset),
             Format::kHasBias, Format::kScaleColumns, kPartsOf<Format, Form>, Form::template kJoins<Format>>;

// Integer sums of codes times activations over `kQuads` quads from quad `first` on, for P panels and R rows,
// and over as many of the other half, in turn with them: sums[h][p][r] = start(h, p, r) + ..., which is asked
// for where it is needed, for registers are few.
template <typename Codes, typename Form, int kQuads, int kHalves, int R, int P, typename Blocks,
          typename Start>
inline void code_sums(I (&sums)[kHalves][P][R], const Blocks& blocks, int first,
                      const typename Form::Block* const (&x)[R], const Start& start) {
  using Products = typename Codes::Products;
  constexpr int kPlanes = Form::template kPlanes<Products>;
  constexpr int kVectors = Codes::kVectors;
  constexpr int kRun = std::min(Products::run(Codes::kBits), kQuads);
  const auto each = [](const auto& run) {
    for (int h = 0; h < kHalves; ++h) {
      for (int p = 0; p < P; ++p) {
        for (int r = 0; r < R; ++r) run(h, p, r);
      }
    }
  };
  const auto add = [&]<typename Dots>(int quad, int from, int to, const Dots& dot) {
    for (int h = 0; h < kHalves; ++h) {
      const int j = quad + kQuads * h;
      B vectors[P][kVectors];
      for (int p = 0; p < P; ++p) Codes::quad(blocks[p], j, vectors[p]);
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < kVectors; ++i) {
          const auto at = [&](int plane) { return Form::digits(*x[r]) + Products::digits_at(j, plane, i); };
          // What a single panel wants once need not become a register.
          if constexpr (P == 1 && requires(const int8_t* p) { Products::add(I(), B(), p); }) {
            for (int plane = from; plane < to; ++plane)
              dot(h, 0, r, plane) = Products::add(dot(h, 0, r, plane), vectors[0][i], at(plane));
          } else {
            B values[kPlanes];
            for (int plane = from; plane < to; ++plane) values[plane] = broadcast(at(plane));
            for (int p = 0; p < P; ++p) {
              for (int plane = from; plane < to; ++plane)
                dot(h, p, r, plane) = Products::add(dot(h, p, r, plane), vectors[p][i], values[plane]);
            }
          }
        }
      }
    }
  };
  if constexpr (Products::kChained) {
    each([&](int h, int p, int r) { sums[h][p][r] = start(h, p, r); });
    for (int plane = 0; plane < kPlanes; ++plane) {
      if (plane > 0) each([&](int h, int p, int r) { sums[h][p][r] = shift_left(sums[h][p][r], 8); });
      for (int j = 0; j < kQuads; ++j)
        add(first + j, plane, plane + 1, [&](int h, int p, int r, int) -> I& { return sums[h][p][r]; });
    }
  } else {
    for (int run = first; run < first + kQuads; run += kRun) {
      const auto before = [&](int h, int p, int r) { return run == first ? start(h, p, r) : sums[h][p][r]; };
      I dots[kHalves][P][R][kPlanes];
      each([&](int h, int p, int r) {
        for (int plane = 0; plane < kPlanes; ++plane) {
          // The last plane is the lowest: its sum may go on from what is there.
          const bool goes_on = Products::kGoesOn && plane == kPlanes - 1;
          dots[h][p][r][plane] = goes_on ? before(h, p, r) : int_zero();
        }
      });
      for (int j = 0; j < kRun; ++j)
        add(run + j, 0, kPlanes, [&](int h, int p, int r, int plane) -> I& { return dots[h][p][r][plane]; });
      each([&](int h, int p, int r) {
        I sum = Products::total(dots[h][p][r][kPlanes - 1]);
        if constexpr (!Products::kGoesOn) sum = sum + before(h, p, r);
        if constexpr (kPlanes == 2) sum = sum + Products::high_total(dots[h][p][r][0]);
        sums[h][p][r] = sum;
      });
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
template <typename Codes, typename Form, int R, int P, typename Acc, typename Unit>
[[gnu::always_inline]] inline void multiply_block(Acc& acc, const quant::PanelMatrix& w,
                                                  const Unit (&units)[P], int64_t s,
                                                  const typename Form::Block* const (&x)[R]) {
  constexpr int kWeightScales = 32 / Codes::kScaleColumns;
  constexpr int kParts = kPartsOf<Codes, Form>;  // as `UnpackedOf` has it
  const auto& blocks = Codes::blocks(units, w, s);
  const auto part_sums = [&]<int kHalves>(I(&sums)[kHalves][P][R], int part) {
    code_sums<Codes, Form, 8 / kParts>(sums, blocks, part * 8 / kParts, x, [&](int h, int p, int r) {
      const I start = Codes::start(units[p], part + h);
      if constexpr (Codes::kOffset <= 0) return start;
      return start + shift_left(set1_int(Form::minus_sum(*x[r], part + h, kParts)), log2_of(Codes::kOffset));
    });
    for (int h = 0; h < kHalves && Codes::kOffset < 0; ++h) {
      for (int r = 0; r < R; ++r) {
        const I total =
            shift_left(set1_int(Form::minus_sum(*x[r], part + h, kParts)), log2_of(-Codes::kOffset));
        for (int p = 0; p < P; ++p) sums[h][p][r] = sums[h][p][r] - total;
      }
    }
  };
  F scales[P][kWeightScales];
  [[maybe_unused]] F biases[P];
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < kWeightScales; ++i) scales[p][i] = Codes::scale(units[p], s * kWeightScales + i);
    if constexpr (Codes::kHasBias) biases[p] = Codes::minus_bias(units[p], s);
  }
  const auto add = [&](int p, int r, F sum, F scale, bool last) {
    F value = fma(sum, scale, acc.get(p, r));
    // Negative, both of them.
    if constexpr (Codes::kHasBias) value = last ? fma(biases[p], set1(x[r]->minus_total), value) : value;
    acc.set(p, r, value);
  };
  [[maybe_unused]] I in_turn[2][P][R];
  if constexpr (Codes::kHalvesInTurn) part_sums(in_turn, 0);
  const auto sums_of = [&]<int kPart>(I(&sums)[P][R]) {
    I now[1][P][R];
    if constexpr (!Codes::kHalvesInTurn) part_sums(now, kPart);
    const auto& from = Codes::kHalvesInTurn ? in_turn[kPart] : now[0];
    for (int p = 0; p < P; ++p) std::copy_n(from[p], R, sums[p]);
  };
  F together[P][R];  // of both halves
  const auto part = [&]<int kPart>() {
    constexpr bool kLast = kPart == kParts - 1;
    I sums[P][R];
    sums_of.template operator()<kPart>(sums);
    for (int r = 0; r < R; ++r) {
      const F x_scale = set1(Form::scale(*x[r], kPart));
      for (int p = 0; p < P; ++p) {
        const F sum = to_float(sums[p][r]);
        if constexpr (kParts == kWeightScales)
          add(p, r, sum, Codes::times(scales[p][kPart], x_scale), kLast);
        else if constexpr (!kLast)
          together[p][r] = sum * x_scale;
        else
          add(p, r, fma(sum, x_scale, together[p][r]), scales[p][0], true);
      }
    }
  };
  if constexpr (Codes::kJoins) {
    I first[P][R], second[P][R];
    sums_of.template operator()<0>(first);
    sums_of.template operator()<1>(second);
    for (int r = 0; r < R; ++r) {
      const F unit = set1(x[r]->unit);
      for (int p = 0; p < P; ++p)
        add(p, r, to_float(join(first[p][r], second[p][r], x[r]->ratio)), Codes::times(scales[p][0], unit),
            true);
    }
  } else {
    part.template operator()<0>();
    if constexpr (kParts == 2) part.template operator()<1>();
  }
}

// A few rows: codes are taken as they lie.
template <typename Format, typename Form, int R, int P>
void fixed_rows(const LinearArgs& args, const typename Form::Block* first, int64_t panel, int64_t row,
                auto fetching) {
  using Codes = Stored<Format, Form, typename Form::template Products<Format::kBits>>;
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

// sums += a block of P panels, held in registers, times `rows` rows from x on, few at a time: what is not a
// product is spread among the products. Each row is a stream of its own, of which the processor loses sight.
template <typename Codes, typename Form, int P>
[[gnu::always_inline]] inline void held_rows(const LinearArgs& args, const Codes (&held)[P],
                                             const typename Form::Block* x, int64_t rows, const Sums& sums) {
  int64_t r = 0;
#pragma GCC unroll 1
  for (; r + 2 <= rows && Form::kScales == 1; r += 2, x += 2 * args.x_stride) {
    __builtin_prefetch(x + 2);
    __builtin_prefetch(x + args.x_stride + 2);
    InMemory acc({sums.at(0, r), sums.panel_stride});
    multiply_block<Codes, Form, 2, P>(acc, *args.weight, held, 0, {x, x + args.x_stride});
  }
#pragma GCC unroll 1
  for (; r < rows; ++r, x += args.x_stride) {
    __builtin_prefetch(x + 2);
    InMemory acc({sums.at(0, r), sums.panel_stride});
    multiply_block<Codes, Form, 1, P>(acc, *args.weight, held, 0, {x});
  }
}

// Block `s` of P panels times `rows` rows (`held_rows`); false, and nothing done, if its scales need
// multiplying and `Codes` would add exponents.
template <typename Codes, typename Form, int P, int... p>
[[gnu::always_inline]] inline bool hold_and_multiply(const LinearArgs& args,
                                                     const std::byte* const (&units)[P], int64_t s,
                                                     const typename Form::Block* x, int64_t rows,
                                                     const Sums& sums, std::integer_sequence<int, p...>) {
  const Codes held[P] = {Codes(units[p], *args.weight, s)...};
  if (Codes::kAddsExponents && (held[p].special() || ...)) return false;
  held_rows<Codes, Form>(args, held, x, rows, sums);
  return true;
}

// Up to kMost rows in turn: a block of codes is unpacked once for all of them.
template <typename Format, typename Form, int kMost, int P>
void rows_in_turn(const LinearArgs& args, const typename Form::Block* first, int64_t panel, int64_t row,
                  int64_t rows, const Fetching<Format::kSharesFetching>& what) {
  Fetching fetching = what;
  const quant::PanelMatrix& w = *args.weight;
  const int64_t sub_blocks = Format::sub_blocks(w);
  const int64_t unit_bytes = Format::unit_bytes(w);
  const int64_t step = unit_bytes / sub_blocks;
  const std::byte* units[P];
  for (int p = 0; p < P; ++p) units[p] = w.panel(panel + p);
  const auto* x = first + row * args.x_stride;
  const auto* end = x + w.columns / 32;
  alignas(64) float outputs[P * kMost * kLanes];  // [P, rows, 16]
  const Sums sums{outputs, rows * kLanes};
  for (int p = 0; p < P; ++p) {
    for (int64_t r = 0; r < rows; ++r) store(sums.at(p, r), load_outputs(args, panel + p, row + r));
  }
  constexpr auto kPanels = std::make_integer_sequence<int, P>();
  constexpr bool kPowers = Format::kHalfScales && (Form::kScales == 1 || Form::template kJoins<Format>);
  while (x != end) {
    for (int64_t s = 0; s < sub_blocks; ++s, ++x) {
      fetching.step(units, s * step, step);
      if (!hold_and_multiply<Held<Format, Form, kPowers>, Form>(args, units, s, x, rows, sums, kPanels))
        hold_and_multiply<Held<Format, Form, false>, Form>(args, units, s, x, rows, sums, kPanels);
    }
    for (int p = 0; p < P; ++p) units[p] += unit_bytes;
  }
  for (int p = 0; p < P; ++p) {
    for (int64_t r = 0; r < rows; ++r) store_outputs(args, panel + p, row + r, load(sums.at(p, r)));
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
  tile<kTile, kRowsInTurn, Format::kSharesFetching>(
      args, begin, end, [&]<int R, int P>(int64_t row, int64_t rows, int64_t panel, const auto& fetching) {
        if constexpr (R == 0)
          rows_in_turn<Format, Form, kTile, P>(args, x, panel, row, rows, fetching);
        else
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

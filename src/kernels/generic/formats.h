// How each panel format yields its scales, biases and codes (layouts: quant/panel.h). A weight is
// scale * (code - kOffset) + bias. kHalfScales: scales are 0, not finite, or from 2^-24 to 2^23, as f16 and
// its products with small integers are. kSharesFetching: see `Fetching`; K-quants gained nothing by it or
// lost, MLX's groups were not measured.

constexpr int64_t kLanes = 16;

// Codes of 32 columns; `p` points at them.
template <int kBits>
inline B quad_codes(const std::byte* p, int j);

template <>
inline B quad_codes<4>(const std::byte* p, int j) {
  return j < 4 ? load_bytes(p + 64 * j) & 0x0F : (load_bytes(p + 64 * (j - 4)) >> 4) & 0x0F;
}
template <>
inline B quad_codes<5>(const std::byte* p, int j) {
  const B high = load_bytes(p + 256);
  return quad_codes<4>(p, j) | ((j <= 4 ? high << (4 - j) : high >> (j - 4)) & 0x10);
}
template <>
inline B quad_codes<6>(const std::byte* p, int j) {
  p += 192 * (j / 4);
  if (j % 4 < 3) return load_bytes(p + 64 * (j % 4)) & 0x3F;
  return ((load_bytes(p) >> 2) & 0x30) | ((load_bytes(p + 64) >> 4) & 0x0C) |
         ((load_bytes(p + 128) >> 6) & 0x03);
}
template <>
inline B quad_codes<8>(const std::byte* p, int j) {
  return load_bytes(p + 64 * j);
}

constexpr int64_t code_bytes(int bits) { return 64 * bits; }

// Whether sums of 16 columns of codes less their offset times digits of 8 bits fit 16 bits.
template <typename Format>
constexpr bool kSumsFit16 =
    std::max(Format::kOffset, (1 << Format::kBits) - 1 - Format::kOffset) * 127 * 16 < 32768;

// q4_0, q5_0, q8_0 (no bias), q4_1, q5_1 (bias): one block of 32 columns.
template <int kCodeBits, int kCodeOffset, bool kBias>
struct Simple {
  static constexpr int kBits = kCodeBits;
  static constexpr int kOffset = kCodeOffset;
  static constexpr bool kHasBias = kBias;
  static constexpr int kScaleColumns = 32;
  static constexpr bool kHalfScales = true;
  static constexpr bool kSharesFetching = true;
  static int64_t sub_blocks(const quant::PanelMatrix&) { return 1; }
  static int64_t unit_bytes(const quant::PanelMatrix&) { return (kBias ? 64 : 32) + code_bytes(kBits); }
  static F scale(const std::byte* unit, int64_t) { return load_f16(unit); }
  static F bias(const std::byte* unit, int64_t) { return load_f16(unit + 32); }
  static F minus_bias(const std::byte* unit, int64_t s) { return zero() - bias(unit, s); }
  static const std::byte* codes(const std::byte* unit, const quant::PanelMatrix&, int64_t) {
    return unit + (kBias ? 64 : 32);
  }
};

// q4_k, q5_k: eight blocks of 32 with 6-bit scales and minima.
template <int kCodeBits>
struct SuperBlock {
  static constexpr int kBits = kCodeBits;
  static constexpr int kOffset = 0;
  static constexpr bool kHasBias = true;
  static constexpr int kScaleColumns = 32;
  static constexpr bool kHalfScales = true;
  static constexpr bool kSharesFetching = false;
  static int64_t sub_blocks(const quant::PanelMatrix&) { return 8; }
  static int64_t unit_bytes(const quant::PanelMatrix&) { return 64 + 256 + 8 * code_bytes(kBits); }
  static F scale(const std::byte* unit, int64_t s) { return load_f16(unit) * load_u8(unit + 64 + 16 * s); }
  static F minus_bias(const std::byte* unit, int64_t s) {
    return load_f16(unit + 32) * load_u8(unit + 192 + 16 * s);
  }
  static F bias(const std::byte* unit, int64_t s) { return zero() - minus_bias(unit, s); }
  static const std::byte* codes(const std::byte* unit, const quant::PanelMatrix&, int64_t s) {
    return unit + 320 + s * code_bytes(kBits);
  }
};

// q6_k: sixteen blocks of 16 with int8 scales; a sub-block here is 32 columns with two scales.
struct Q6K {
  static constexpr int kBits = 6;
  static constexpr int kOffset = 32;
  static constexpr bool kHasBias = false;
  static constexpr int kScaleColumns = 16;
  static constexpr bool kHalfScales = true;
  static constexpr bool kSharesFetching = false;
  static int64_t sub_blocks(const quant::PanelMatrix&) { return 8; }
  static int64_t unit_bytes(const quant::PanelMatrix&) { return 32 + 256 + 8 * code_bytes(6); }
  static F scale(const std::byte* unit, int64_t half) {
    return load_f16(unit) * load_i8(unit + 32 + 16 * half);
  }
  static F bias(const std::byte*, int64_t) { return zero(); }
  static const std::byte* codes(const std::byte* unit, const quant::PanelMatrix&, int64_t s) {
    return unit + 288 + s * code_bytes(6);
  }
};

struct ScaleF16 {
  static constexpr int64_t kBytes = 32;
  static F get(const std::byte* p) { return load_f16(p); }
};
struct ScaleBf16 {
  static constexpr int64_t kBytes = 32;
  static F get(const std::byte* p) { return load_bf16(p); }
};
struct ScaleF32 {
  static constexpr int64_t kBytes = 64;
  static F get(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
};

// MLX affine: one scale and bias a group of 32, 64 or 128.
template <int kCodeBits, typename Scale>
struct Affine {
  static constexpr int kBits = kCodeBits;
  static constexpr int kOffset = 0;
  static constexpr bool kHasBias = true;
  static constexpr int kScaleColumns = 32;
  static constexpr bool kHalfScales = std::is_same_v<Scale, ScaleF16>;
  static constexpr bool kSharesFetching = false;
  static int64_t sub_blocks(const quant::PanelMatrix& w) { return w.group_size / 32; }
  static int64_t unit_bytes(const quant::PanelMatrix& w) {
    return 2 * Scale::kBytes + sub_blocks(w) * code_bytes(kBits);
  }
  static F scale(const std::byte* unit, int64_t) { return Scale::get(unit); }
  static F bias(const std::byte* unit, int64_t) { return Scale::get(unit + Scale::kBytes); }
  static F minus_bias(const std::byte* unit, int64_t s) { return zero() - bias(unit, s); }
  static const std::byte* codes(const std::byte* unit, const quant::PanelMatrix&, int64_t s) {
    return unit + 2 * Scale::kBytes + s * code_bytes(kBits);
  }
};

// Plain elements: columns of 16 rows. bf16 comes in pairs of columns, as products of pairs want it.
struct PlainF32 : ScaleF32 {
  static constexpr int64_t kColumns = 1;
  static F column(const std::byte* p, int) { return get(p); }
};
struct PlainF16 : ScaleF16 {
  static constexpr int64_t kColumns = 1;
  static F column(const std::byte* p, int) { return get(p); }
};
struct PlainBf16 {
  static constexpr int64_t kColumns = 2;
  static constexpr int64_t kBytes = 64;
  static F column(const std::byte* p, int i) { return load_bf16_pair(p, i); }
};

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

constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

// Asks for `bytes` from p on, kLocality as of __builtin_prefetch: 0 past the caches but the nearest, to be
// used soon and once; 2 into the second; 3 into all.
template <int kLocality>
inline void fetch(const std::byte* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, kLocality);
}

// Asks for what is read some way behind `p`, `bytes` long, at byte `at` of one of `together` panels that are
// read side by side: near their end that lies in the panels after them.
inline void fetch_ahead(const std::byte* p, int64_t bytes, int64_t at, int64_t panel_bytes, int together) {
  constexpr int64_t kAhead = 3584;
  if (at + kAhead >= panel_bytes) p += (together - 1) * panel_bytes;
  if (kPastCaches)
    fetch<0>(p + kAhead, bytes);
  else
    fetch<3>(p + kAhead, bytes);
}

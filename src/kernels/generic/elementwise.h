// Operations on rows of activations.

// e^x within 2 ulp (Cody-Waite reduction, degree-7 polynomial). Below -86 it stays at e^-86, so that
// no result is subnormal; above 88.7 it is inf; NaN stays NaN.
inline F exp(F x) {
  const F clamped = max(set1(-86.0F), min(set1(89.0F), x));
  const I n = round_to_int(clamped * set1(1.44269504088896341F));
  const F steps = to_float(n);
  F r = fma(steps, set1(-0.693359375F), clamped);
  r = fma(steps, set1(2.12194440e-4F), r);
  F p = set1(1.0F / 5040);
  p = fma(p, r, set1(1.0F / 720));
  p = fma(p, r, set1(1.0F / 120));
  p = fma(p, r, set1(1.0F / 24));
  p = fma(p, r, set1(1.0F / 6));
  p = fma(p, r, set1(0.5F));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  return scale_by_power(p, n);
}

// Up to 16 of `count` floats; lanes beyond the last are 0.
inline F load_part(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : 0.0F;
  return load(lanes);
}
inline void store_part(float* p, int64_t count, F x) {
  if (count >= kLanes) {
    store(p, x);
    return;
  }
  float lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

// The least power of two that is not below `value` nor 2^-100: scales of f16 times it are normal numbers, and
// so is what divides by it.
inline float power_at_least(float value) {
  const uint32_t bits = (std::bit_cast<uint32_t>(value) + 0x7FFFFF) & 0x7F800000;
  return std::max(std::bit_cast<float>(bits), 0x1p-100F);
}

// So many blocks of fixed point are made together: their scales in loops that become vectors.
constexpr int64_t kBlocksTogether = 16;

// The columns from x on as halves of a block of 32, zeros behind the last.
inline void load_block(const float* x, int64_t columns, F (&halves)[2]) {
  halves[0] = load_part(x, columns);
  halves[1] = columns > 16 ? load_part(x + 16, columns - 16) : zero();
}

// The largest magnitudes of the halves of `count` blocks: peaks[half][block]. What is not finite, or so large
// that its power of two times a scale might not be, makes sums start with NaN.
inline void block_peaks(const float* x, int64_t columns, int64_t count, float (&peaks)[2][kBlocksTogether],
                        float* start) {
  for (int64_t b = 0; b < count; ++b) {
    F halves[2];
    load_block(x + 32 * b, columns - 32 * b, halves);
    for (int half = 0; half < 2; ++half) peaks[half][b] = largest_magnitude(halves[half]);
  }
  for (int64_t b = 0; b < count; ++b) {
    if (!(peaks[0][b] <= 0x1p118F && peaks[1][b] <= 0x1p118F)) {  // or NaN
      *start = std::numeric_limits<float>::quiet_NaN();
      peaks[0][b] = peaks[1][b] = 0;
    }
  }
}

float to_fixed16(const float* x, int64_t columns, bool many, Fixed16* blocks) {
  float start = 0;
  for (int64_t k = 0; k < columns; k += 32 * kBlocksTogether) {
    const int64_t count = std::min(kBlocksTogether, (columns - k + 31) / 32);
    float peaks[2][kBlocksTogether] = {}, scales[kBlocksTogether], inverses[kBlocksTogether];
    block_peaks(x + k, columns - k, count, peaks, &start);
    for (int64_t b = 0; b < kBlocksTogether; ++b) {
      scales[b] = power_at_least(std::max(peaks[0][b], peaks[1][b]) / 32639.0F);
      inverses[b] = 1.0F / scales[b];
    }
    for (int64_t b = 0; b < count; ++b, ++blocks) {
      F halves[2];
      load_block(x + k + 32 * b, columns - k - 32 * b, halves);
      I integers[2];
      for (int half = 0; half < 2; ++half) integers[half] = round_to_int(halves[half] * set1(inverses[b]));
      if (many)
        ManyWideProducts::store_wide(blocks->digits, integers[0], integers[1]);
      else
        WideProducts::store_wide(blocks->digits, integers[0], integers[1]);
      blocks->scale = scales[b];
      // Sums of integers are exact in any order, and wrap where values are not finite.
      minus_sums(integers[0], integers[1], blocks->minus_sum);
      blocks->minus_sum[2] = static_cast<int32_t>(static_cast<uint32_t>(blocks->minus_sum[0]) +
                                                  static_cast<uint32_t>(blocks->minus_sum[1]));
      blocks->minus_total = static_cast<float>(blocks->minus_sum[2]) * blocks->scale;
    }
  }
  return start;
}

float to_fixed8(const float* x, int64_t columns, bool many, Fixed8* blocks) {
  float start = 0;
  const I raised = set1_int(many && ManyByteProducts::kUnsignedDigits ? 128 : 0);
  for (int64_t k = 0; k < columns; k += 32 * kBlocksTogether) {
    const int64_t count = std::min(kBlocksTogether, (columns - k + 31) / 32);
    float peaks[2][kBlocksTogether] = {}, units[kBlocksTogether];
    float ratios[2][kBlocksTogether], inverses[2][kBlocksTogether];
    block_peaks(x + k, columns - k, count, peaks, &start);
    for (int64_t b = 0; b < kBlocksTogether; ++b)
      units[b] = power_at_least(std::max(peaks[0][b], peaks[1][b]) / (127.0F * 32767));
    for (int half = 0; half < 2; ++half) {
      for (int64_t b = 0; b < kBlocksTogether; ++b) {
        const float ratio = std::ceil(peaks[half][b] / (127 * units[b]));
        ratios[half][b] = std::min(std::max(ratio, 1.0F), 32767.0F);
        inverses[half][b] = 1.0F / (ratios[half][b] * units[b]);
      }
    }
    for (int64_t b = 0; b < count; ++b, ++blocks) {
      F halves[2];
      load_block(x + k + 32 * b, columns - k - 32 * b, halves);
      I integers[2];
      for (int half = 0; half < 2; ++half) {
        integers[half] = round_to_int(halves[half] * set1(inverses[half][b]));
        blocks->ratio[half] = static_cast<int16_t>(ratios[half][b]);
        blocks->scale[half] = ratios[half][b] * units[b];
      }
      blocks->unit = units[b];
      store_bytes(blocks->digits, integers[0] + raised, integers[1] + raised);
      minus_sums(integers[0], integers[1], blocks->minus_sum);
      blocks->minus_total = std::fma(static_cast<float>(blocks->minus_sum[1]), blocks->scale[1],
                                     static_cast<float>(blocks->minus_sum[0]) * blocks->scale[0]);
    }
  }
  return start;
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  F squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const F part = load_part(x + i, n - i);
    squares = fma(part, part, squares);
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const F factor = set1(1.0F / std::sqrt(mean + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    F part = load_part(x + i, n - i) * factor;
    if (weight != nullptr) part = part * load_part(weight + i, n - i);
    store_part(y + i, n - i, part);
  }
}

void rotate_halves(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const F a = load_part(x + i, count);
    const F b = load_part(x + half + i, count);
    const F c = load_part(cosine + i, count);
    const F s = load_part(sine + i, count);
    store_part(x + i, count, a * c - b * s);
    store_part(x + half + i, count, b * c + a * s);
  }
}

void silu_mul(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F g = load_part(gate + i, n - i);
    const F activated = g / (set1(1.0F) + exp(zero() - g));
    store_part(out + i, n - i, activated * load_part(up + i, n - i));
  }
}

void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_part(x + i, n - i, load_part(x + i, n - i) + load_part(y + i, n - i));
  }
}

void add_scaled(float* x, const float* y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_part(x + i, n - i, load_part(x + i, n - i) + load_part(y + i, n - i) * set1(factor));
}

void scale(const float* x, float factor, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store_part(y + i, n - i, load_part(x + i, n - i) * set1(factor));
}

void divide(const float* x, float divisor, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store_part(y + i, n - i, load_part(x + i, n - i) / set1(divisor));
}

void f16_to_f32(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load_f16(x + i));
  if (i < n) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, x + i, static_cast<size_t>(n - i) * sizeof(uint16_t));
    store_part(y + i, n - i, load_f16(halves));
  }
}

void f32_to_f16(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    uint16_t halves[kLanes];
    store_f16(halves, load_part(x + i, n - i));
    std::memcpy(y + i, halves, static_cast<size_t>(std::min(n - i, kLanes)) * sizeof(uint16_t));
  }
}

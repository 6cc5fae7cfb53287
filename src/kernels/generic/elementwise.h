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

// Vector `i` of n floats; lanes beyond the end are `fill`.
inline F load_part(const float* p, int64_t count, float fill) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : fill;
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

// Values over their scale as integers, |n| <= most; the scale in `scale`.
template <int kCount>
inline void quantise(const F (&values)[kCount], float most, I (&integers)[kCount], float* scale) {
  F peaks = values[0];
  for (int i = 1; i < kCount; ++i) peaks = larger_magnitude(peaks, values[i]);
  const float peak = largest_magnitude(peaks);
  // Infinity times 0 is NaN: what is not finite reaches the scale, so that it reaches the result.
  *scale = peak / most + peak * 0.0F;
  // The quotient of the tiniest peaks would be infinite.
  const float lift = peak < 0x1p-64F ? 0x1p64F : 1.0F;
  const F inverse = set1(peak > 0 ? most / (peak * lift) : 0.0F);
  for (int i = 0; i < kCount; ++i) {
    const F value = lift == 1.0F ? values[i] : values[i] * set1(lift);
    integers[i] = round_to_int(value * inverse);
  }
}

void to_fixed16(const float* x, int64_t columns, bool many, Fixed16* blocks) {
  for (int64_t k = 0; k < columns; k += 32, x += 32, ++blocks) {
    const F parts[2] = {load_part(x, columns - k, 0),
                        columns - k > 16 ? load_part(x + 16, columns - k - 16, 0) : zero()};
    I integers[2];
    quantise(parts, 32639.0F, integers, &blocks->scale);
    if (many)
      ManyWideProducts::store_wide(blocks->digits, integers[0], integers[1]);
    else
      WideProducts::store_wide(blocks->digits, integers[0], integers[1]);
    // Sums of integers are exact in any order, and wrap where values are not finite.
    minus_sums(integers[0], integers[1], blocks->minus_sum);
    blocks->minus_sum[2] = static_cast<int32_t>(static_cast<uint32_t>(blocks->minus_sum[0]) +
                                                static_cast<uint32_t>(blocks->minus_sum[1]));
    blocks->minus_total = static_cast<float>(blocks->minus_sum[2]) * blocks->scale;
  }
}

void to_fixed8(const float* x, int64_t columns, bool many, Fixed8* blocks) {
  for (int64_t k = 0; k < columns; k += 32, x += 32, ++blocks) {
    I integers[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t count = columns - k - 16 * half;
      const F part[1] = {count > 0 ? load_part(x + 16 * half, count, 0) : zero()};
      I rounded[1];
      quantise(part, 127.0F, rounded, &blocks->scale[half]);
      integers[half] = rounded[0];
    }
    const I raised = set1_int(many && ManyByteProducts::kUnsignedDigits ? 128 : 0);
    store_bytes(blocks->digits, integers[0] + raised, integers[1] + raised);
    minus_sums(integers[0], integers[1], blocks->minus_sum);
    blocks->minus_total = std::fma(static_cast<float>(blocks->minus_sum[1]), blocks->scale[1],
                                   static_cast<float>(blocks->minus_sum[0]) * blocks->scale[0]);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  F squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const F part = load_part(x + i, n - i, 0);
    squares = fma(part, part, squares);
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const F factor = set1(1.0F / std::sqrt(mean + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    F part = load_part(x + i, n - i, 0) * factor;
    if (weight != nullptr) part = part * load_part(weight + i, n - i, 0);
    store_part(y + i, n - i, part);
  }
}

void rotate_halves(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const F a = load_part(x + i, count, 0);
    const F b = load_part(x + half + i, count, 0);
    const F c = load_part(cosine + i, count, 0);
    const F s = load_part(sine + i, count, 0);
    store_part(x + i, count, a * c - b * s);
    store_part(x + half + i, count, b * c + a * s);
  }
}

void rotate_pairs(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

void silu_mul(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F g = load_part(gate + i, n - i, 0);
    const F activated = g / (set1(1.0F) + exp(zero() - g));
    store_part(out + i, n - i, activated * load_part(up + i, n - i, 0));
  }
}

void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_part(x + i, n - i, load_part(x + i, n - i, 0) + load_part(y + i, n - i, 0));
  }
}

void divide(const float* x, float divisor, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_part(y + i, n - i, load_part(x + i, n - i, 0) / set1(divisor));
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
    store_f16(halves, load_part(x + i, n - i, 0));
    std::memcpy(y + i, halves, static_cast<size_t>(std::min(n - i, kLanes)) * sizeof(uint16_t));
  }
}

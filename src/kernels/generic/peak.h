// The arithmetic limit: independent accumulators, no memory. Enough of them to hide the latency of a
// multiply-add on the processors of the last ten years.

int64_t peak_f32(int64_t rounds) {
  F a = set1(1), b = set1(2), c = set1(3), d = set1(4), e = set1(5);
  const F x = set1(0.999F), y = set1(0.001F);
  for (int64_t i = 0; i < rounds; ++i) {
    a = fma(a, x, y);
    b = fma(b, x, y);
    c = fma(c, x, y);
    d = fma(d, x, y);
    e = fma(e, x, y);
  }
  // The result must matter, or the compiler leaves the loop out.
  const float total = sum(a + b + c + d + e);
  return total == total ? rounds * 5 * kLanes * 2 : 0;
}

int64_t peak_int8(int64_t rounds) {
  Dot a = dot_zero(), b = dot_zero(), c = dot_zero(), d = dot_zero(), e = dot_zero();
  alignas(64) std::byte bytes[64] = {};
  int8_t quad[4] = {1, 1, 1, 1};
  const B codes = load_bytes(bytes);
  for (int64_t i = 0; i < rounds; ++i) {
    a = dot(a, codes, quad);
    b = dot(b, codes, quad);
    c = dot(c, codes, quad);
    d = dot(d, codes, quad);
    e = dot(e, codes, quad);
    asm volatile("" : : "r"(quad) : "memory");
  }
  int32_t lanes[kLanes];
  store_int(lanes, dot_sum(a) + dot_sum(b) + dot_sum(c) + dot_sum(d) + dot_sum(e));
  return lanes[0] == 0 ? rounds * 5 * kLanes * 4 * 2 : 0;
}

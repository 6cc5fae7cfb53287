// The limit of reading: every byte is loaded once, and summed so that it must be. A loop over single words
// reaches half of it.
int64_t peak_read(const float* x, int64_t n) {
  F a = zero(), b = zero(), c = zero(), d = zero();
  for (int64_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = a + load(x + i);
    b = b + load(x + i + kLanes);
    c = c + load(x + i + 2 * kLanes);
    d = d + load(x + i + 3 * kLanes);
  }
  const float total = sum((a + b) + (c + d));
  return total == total ? n * static_cast<int64_t>(sizeof(float)) : 0;
}

// The arithmetic limit: kPeakSums independent accumulators, as many as hide the latency of a multiply-add and
// still fit the registers; no memory. Indices are constants, or the compiler keeps the accumulators in
// memory.

template <size_t... S>
int64_t peak_f32(int64_t rounds, std::index_sequence<S...>) {
  F sums[] = {set1(static_cast<float>(S))...};
  for (F& sum : sums)
    asm volatile("" : "+m"(sum));  // or registers of one sum, being equal, were computed once
  const F x = set1(0.999F), y = set1(0.001F);
  for (int64_t i = 0; i < rounds; ++i) ((sums[S] = fma(sums[S], x, y)), ...);
  // The result must matter, or the compiler leaves the loop out.
  const float total = sum((sums[S] + ...));
  return total == total ? rounds * kPeakSums * kLanes * 2 : 0;
}
int64_t peak_f32(int64_t rounds) { return peak_f32(rounds, std::make_index_sequence<kPeakSums>()); }

template <size_t... S>
int64_t peak_int8(int64_t rounds, std::index_sequence<S...>) {
  // Sums that start alike, and products of equal operands, would be computed once.
  I sums[] = {set1_int(static_cast<int32_t>(S))...};
  const int8_t quads[][4] = {{static_cast<int8_t>(S), 0, 1, 0}...};
  B x[] = {broadcast(quads[S])...};
  for (B& operand : x) asm volatile("" : "+m"(operand));  // or some would be broadcast anew in every round
  alignas(64) const std::byte bytes[64] = {};
  B codes = load_bytes(bytes);
  // Or moves between registers take a tenth of the time on AVX2.
#pragma GCC unroll 8
  for (int64_t i = 0; i < rounds; ++i) {
    ((sums[S] = ByteProducts::add(sums[S], codes, x[S])), ...);
    asm volatile("" : "+m"(codes));  // as if it were another: no product is computed before the loop
  }
  // Every lane must matter, or the compiler leaves out those that do not.
  const float total = sum(to_float((ByteProducts::total(sums[S]) + ...)));
  return total == total ? rounds * kPeakDots * kLanes * 4 * 2 : 0;
}
int64_t peak_int8(int64_t rounds) { return peak_int8(rounds, std::make_index_sequence<kPeakDots>()); }

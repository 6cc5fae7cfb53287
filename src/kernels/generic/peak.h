// The arithmetic limit: kPeakSums independent accumulators, as many as hide the latency of a multiply-add and
// still fit the registers; no memory. Indices are constants, or the compiler keeps the accumulators in
// memory.

template <size_t... S>
int64_t peak_f32(int64_t rounds, std::index_sequence<S...>) {
  F sums[] = {set1(static_cast<float>(S))...};
  const F x = set1(0.999F), y = set1(0.001F);
  for (int64_t i = 0; i < rounds; ++i) ((sums[S] = fma(sums[S], x, y)), ...);
  // The result must matter, or the compiler leaves the loop out.
  const float total = sum((sums[S] + ...));
  return total == total ? rounds * kPeakSums * kLanes * 2 : 0;
}
int64_t peak_f32(int64_t rounds) { return peak_f32(rounds, std::make_index_sequence<kPeakSums>()); }

template <size_t... S>
int64_t peak_int8(int64_t rounds, std::index_sequence<S...>) {
  Dot sums[] = {(static_cast<void>(S), dot_zero())...};
  // One a sum: products of equal operands would be computed once.
  const int8_t quads[][4] = {{static_cast<int8_t>(S), 1, 2, 3}...};
  alignas(64) const std::byte bytes[64] = {};
  const B codes = load_bytes(bytes);
  for (int64_t i = 0; i < rounds; ++i) {
    ((sums[S] = dot(sums[S], codes, quads[S])), ...);
    asm volatile("" : : "r"(quads) : "memory");
  }
  int32_t lanes[kLanes];
  store_int(lanes, (dot_sum(sums[S]) + ...));
  return lanes[0] == 0 ? rounds * kPeakSums * kLanes * 4 * 2 : 0;
}
int64_t peak_int8(int64_t rounds) { return peak_int8(rounds, std::make_index_sequence<kPeakSums>()); }

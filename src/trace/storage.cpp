#include "trace/storage.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t splitmix64(uint64_t x) {
  uint64_t z = x + 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

// The columns of the smallest keys, in ascending order.
std::vector<int64_t> sampled_columns(int64_t width, const TraceStorage& storage) {
  const uint64_t base = splitmix64(storage.seed);
  std::vector<int64_t> columns(static_cast<size_t>(width));
  std::iota(columns.begin(), columns.end(), 0);
  const auto key = [&](int64_t i) { return splitmix64(base + static_cast<uint64_t>(i)); };
  std::ranges::nth_element(columns, columns.begin() + storage.count, {}, key);
  columns.resize(static_cast<size_t>(storage.count));
  std::ranges::sort(columns);
  return columns;
}

std::vector<float> sketch(std::span<const float> values, int64_t width, const TraceStorage& storage) {
  const uint64_t base = splitmix64(storage.seed);
  const int64_t count = storage.count, rows = static_cast<int64_t>(values.size()) / width;
  const int64_t words = (count + 63) / 64;
  std::vector<double> sums(static_cast<size_t>(rows * count));
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t word = 0; word < words; ++word) {
      const uint64_t signs =
          splitmix64(base + static_cast<uint64_t>(i) * 1048576 + static_cast<uint64_t>(word) + 1);
      for (int64_t j = word * 64; j < std::min(count, word * 64 + 64); ++j) {
        const bool plus = (signs >> (j % 64) & 1) != 0;
        for (int64_t t = 0; t < rows; ++t) {
          const double x = values[static_cast<size_t>(t * width + i)];
          sums[static_cast<size_t>(t * count + j)] += plus ? x : -x;
        }
      }
    }
  }
  std::vector<float> kept(sums.size());
  const double scale = 1 / std::sqrt(static_cast<double>(count));
  std::ranges::transform(sums, kept.begin(), [=](double sum) { return static_cast<float>(sum * scale); });
  return kept;
}

}  // namespace

TraceStorage parse_storage(const std::string& text, uint64_t seed) {
  constexpr int64_t kFewest = 8;  // fewer columns or sums say too little of the size of an error
  if (text == "full") return {};
  TraceStorage storage{TraceStorage::Kind::sample, 0, seed};
  const size_t colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  if (kind == "sketch") storage.kind = TraceStorage::Kind::sketch;
  const char* end = text.data() + text.size();
  if (colon == std::string::npos || (kind != "sample" && kind != "sketch") ||
      std::from_chars(text.data() + colon + 1, end, storage.count).ptr != end || storage.count < kFewest ||
      storage.count > 1048576) {
    fail(ErrorCode::invalid_argument,
         "[trace] store: expected full, sample:N or sketch:N, N from {} to 1048576; got {}", kFewest, text);
  }
  return storage;
}

std::string_view storage_name(TraceStorage::Kind kind) {
  switch (kind) {
    case TraceStorage::Kind::sample: return "sample";
    case TraceStorage::Kind::sketch: return "sketch";
    default: return "full";
  }
}

bool kept_whole(const TraceStorage& storage, int64_t width, const std::string& axes) {
  return storage.kind == TraceStorage::Kind::full || width <= storage.count || axes == "T E" ||
         axes == "T H K";
}

std::vector<float> reduce(std::span<const float> values, int64_t width, const TraceStorage& storage) {
  if (storage.kind == TraceStorage::Kind::sketch) return sketch(values, width, storage);
  const std::vector<int64_t> columns = sampled_columns(width, storage);
  std::vector<float> kept;
  kept.reserve(values.size() / static_cast<size_t>(width) * columns.size());
  for (size_t row = 0; row < values.size(); row += static_cast<size_t>(width)) {
    for (const int64_t i : columns) kept.push_back(values[row + static_cast<size_t>(i)]);
  }
  return kept;
}

}  // namespace lockstep

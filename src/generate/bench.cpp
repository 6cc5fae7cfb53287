#include "lockstep/bench.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "tensor/fail.h"
#include "thread/pool.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Best of a few runs of `work` on every thread, in 1e9 units a second: a limit is what the machine can
// do when nothing disturbs it.
double best_rate(Pool& pool, const std::function<int64_t(int64_t)>& work) {
  constexpr int kRuns = 5;
  double best = 0;
  std::vector<int64_t> done(static_cast<size_t>(pool.threads()));
  for (int run = 0; run < kRuns; ++run) {
    const auto start = Clock::now();
    pool.run(pool.threads(), [&](int64_t chunk) { done[chunk] = work(chunk); });
    const double seconds = seconds_since(start);
    int64_t total = 0;
    for (int64_t each : done) total += each;
    best = std::max(best, static_cast<double>(total) / seconds * 1e-9);
  }
  return best;
}

double measure_read(Pool& pool, const kernels::Table& table) {
  constexpr int64_t kFloats = int64_t{1} << 25;  // 128 MB a thread: beyond any cache
  std::vector<std::vector<float>> buffers(static_cast<size_t>(pool.threads()));
  pool.run(pool.threads(), [&](int64_t chunk) { buffers[chunk].assign(kFloats, 1.0F); });
  return best_rate(pool, [&](int64_t chunk) { return table.peak_read(buffers[chunk].data(), kFloats); });
}

Spread spread_of(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t n = values.size();
  return {(values[(n - 1) / 2] + values[n / 2]) / 2, values.front(), values.back()};
}

// Ids without meaning, but as spread as text: the speed depends on neither.
std::vector<int32_t> some_ids(int64_t count, int64_t vocab, uint64_t seed) {
  std::vector<int32_t> ids;
  uint64_t state = seed;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    ids.push_back(static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab)));
  }
  return ids;
}

void check(const Model& model, const BenchOptions& options) {
  const auto require = [](bool good, const char* name, int64_t value) {
    if (!good) fail(ErrorCode::invalid_argument, "[bench] {}: expected at least 1, got {}", name, value);
  };
  require(options.prefill >= 1, "prefill", options.prefill);
  require(options.decode >= 1, "decode", options.decode);
  require(options.streams >= 1, "streams", options.streams);
  require(options.repeat >= 1, "repeat", options.repeat);
  if (options.depth < 0)
    fail(ErrorCode::invalid_argument, "[bench] depth: expected 0 or more, got {}", options.depth);
  const int64_t context = options.session.context > 0 ? options.session.context : model.info().context;
  const int64_t needed = options.depth + std::max(options.prefill, options.decode);
  if (needed > context) {
    fail(ErrorCode::context_full, "[bench] context: expected room for {} tokens, got {}", needed, context);
  }
}

}  // namespace

MachineLimits measure_limits(int threads, const std::string& isa) {
  const kernels::Table& table = kernels::select(isa);
  Pool pool(threads);
  MachineLimits limits;
  limits.read_gbs = measure_read(pool, table);
  constexpr int64_t kRounds = 2'000'000;
  limits.f32_gops = best_rate(pool, [&](int64_t) { return table.peak_f32(kRounds); });
  limits.int8_gops = best_rate(pool, [&](int64_t) { return table.peak_int8(kRounds); });
  if (table.peak_bf16 != nullptr)
    limits.bf16_gops = best_rate(pool, [&](int64_t) { return table.peak_bf16(kRounds); });
  return limits;
}

BenchResult run_bench(const std::shared_ptr<const Model>& model, const BenchOptions& options) {
  check(*model, options);
  const int64_t vocab = model->info().vocab;
  const std::vector<int32_t> past = some_ids(options.depth, vocab, 1);
  const std::vector<int32_t> prompt = some_ids(options.prefill, vocab, 2);
  std::vector<double> prefill, decode;
  int64_t cache_bytes = 0;
  Session deep(model, options.session);
  if (!past.empty()) deep.sync(past);
  // One round more than asked for: the first warms caches and clocks.
  for (int round = 0; round <= options.repeat; ++round) {
    Session first = deep.fork();
    std::vector<int32_t> whole = past;
    std::vector<Session> sessions;
    for (int64_t s = 0; s < options.streams; ++s) sessions.push_back(first.fork());
    whole.insert(whole.end(), prompt.begin(), prompt.end());
    auto start = Clock::now();
    first.sync(whole);
    const double prefill_seconds = seconds_since(start);

    std::vector<Session*> pointers;
    for (Session& session : sessions) pointers.push_back(&session);
    start = Clock::now();
    for (int64_t step = 0; step < options.decode; ++step) {
      const std::vector<int32_t> ids = some_ids(options.streams, vocab, 100 + static_cast<uint64_t>(step));
      std::vector<std::span<const int32_t>> parts;
      for (const int32_t& id : ids) parts.emplace_back(&id, 1);
      append_together(pointers, parts);
      if (step == options.decode / 2) cache_bytes = sessions[0].cache_bytes();
    }
    const double decode_seconds = seconds_since(start);
    if (options.progress) options.progress((round + 1.0) / (options.repeat + 1.0));
    if (round == 0) continue;
    prefill.push_back(static_cast<double>(options.prefill) / prefill_seconds);
    decode.push_back(static_cast<double>(options.decode * options.streams) / decode_seconds);
  }
  BenchResult result;
  result.prefill_tps = spread_of(prefill);
  result.decode_tps = spread_of(decode);
  result.token_bytes = model->info().token_bytes + cache_bytes;
  // A pass reads the weights once for all its streams.
  const double passes = result.decode_tps.median / static_cast<double>(options.streams);
  result.decode_gbs =
      passes * 1e-9 * static_cast<double>(model->info().token_bytes + cache_bytes * options.streams);
  const double operations = 2.0 * (static_cast<double>(model->info().row_weights * options.prefill) +
                                   static_cast<double>(model->info().logits_weights));
  result.prefill_gops = operations * result.prefill_tps.median / static_cast<double>(options.prefill) * 1e-9;
  return result;
}

}  // namespace lockstep

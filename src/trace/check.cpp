// Invariants that any model must keep, whatever the reference: the logits do not depend on how they are
// computed.
#include <algorithm>
#include <cstring>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/symmetries.h"

namespace lockstep {
namespace {

bool same(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

std::vector<int32_t> random_ids(int64_t count, uint64_t seed, int64_t vocab) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) {
    seed = seed * 6364136223846793005U + 1442695040888963407U;
    id = static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab));
  }
  return ids;
}

}  // namespace

std::optional<TraceEvent> first_change(const Trace& one, const Trace& other) {
  for (size_t i = 0; i < std::min(one.events().size(), other.events().size()); ++i) {
    if (one.events()[i].hash != other.events()[i].hash) return one.events()[i];
  }
  return {};
}

std::vector<CheckResult> check_model(const std::filesystem::path& path, const ModelOptions& options,
                                     KvType kv_type, int64_t length, const std::string& fault,
                                     const std::function<void(const CheckResult&)>& told) {
  if (length < 2)
    fail(ErrorCode::invalid_argument, "[check] length: expected at least 2 tokens, got {}", length);
  std::vector<CheckResult> results;
  const auto model = Model::load(path, options);
  const int64_t vocab = model->info().vocab;
  const std::vector<int32_t> ids = random_ids(length, 1, vocab);
  const auto session = [&](const std::shared_ptr<const Model>& of, int64_t chunk = 256) {
    SessionOptions session_options;
    session_options.kv_type = kv_type;
    session_options.chunk = chunk;
    return Session(of, session_options);
  };
  const Tensor whole = session(model).append(ids);
  const auto last = whole.values().last(static_cast<size_t>(vocab));
  const auto add = [&](std::string name, bool held) {
    results.push_back({std::move(name), held});
    if (told) told(results.back());
  };

  add("no NaN, no infinity", std::ranges::all_of(whole.values(), [](float x) { return x - x == 0; }));
  TraceOptions repeated;
  repeated.sequences = {{ids, {}}};
  repeated.steps = 2;
  repeated.model = options;
  repeated.kv_type = kv_type;
  repeated.fault = fault;
  const auto change = first_change(record_trace(path, repeated), record_trace(path, repeated));
  add(change
          ? fmt::format("the same again: {} of step {} changes between runs, a race or memory never written",
                        change->name(), change->step)
          : "the same again, at every site",
      !change);
  for (const int threads : {1, 2, 3}) {
    ModelOptions other = options;
    other.threads = threads;
    add(fmt::format("{} thread{}", threads, threads == 1 ? "" : "s"),
        same(session(Model::load(path, other)).append(ids).values(), whole.values()));
  }
  for (const int64_t chunk : {1, 7, 32, 33}) {
    add(fmt::format("chunks of {}{}", chunk, chunk == 1 ? ": decode is prefill" : ""),
        same(session(model, chunk).append(ids).values(), whole.values()));
  }
  std::vector<Session> three;
  for (int i = 0; i < 3; ++i) three.push_back(session(model));
  const std::vector<Session*> pointers = {&three[0], &three[1], &three[2]};
  const std::vector<std::vector<int32_t>> texts = {random_ids(1, 2, vocab), ids,
                                                   random_ids(length / 2 + 1, 3, vocab)};
  const std::vector<std::span<const int32_t>> parts(texts.begin(), texts.end());
  add("beside two other sequences", same(append_together(pointers, parts)[1].values(), whole.values()));
  const std::vector<Session*> turned = {&three[2], &three[0], &three[1]};
  for (Session& each : three) each.rewind(0);
  const std::vector<std::span<const int32_t>> turned_parts = {parts[2], parts[0], parts[1]};
  add("in another order of the batch",
      same(append_together(turned, turned_parts)[2].values(), whole.values()));
  Session warm = session(model);
  std::vector<int32_t> other = ids;
  std::fill(other.begin() + length / 2, other.end(), ids[0]);
  warm.sync(other);
  add("after a shared prefix", same(warm.sync(ids).values(), last));
  warm.rewind(length / 3);
  add("after a rewind", same(warm.sync(ids).values(), last));
  Session copy = warm.fork();
  add("in a fork", same(copy.append({ids.data(), 1}).values(), warm.append({ids.data(), 1}).values()));
  for (CheckResult& each : check_symmetries(path, options, kv_type, ids, fault))
    add(std::move(each.name), each.held);
  return results;
}

}  // namespace lockstep

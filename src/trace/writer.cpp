// Writing a trace directory: beside its place until it is whole. Format: docs/trace-format.md.
#include "trace/writer.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>

#include "format/presence.h"
#include "format/write_file.h"
#include "lockstep/checkpoint.h"
#include "tensor/fail.h"
#include "trace/storage.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kShardBytes = size_t{64} << 20;

std::string tensor_key(const TraceEvent& event) {
  const std::string chunk = event.chunk > 0 ? fmt::format(".c{}", event.chunk) : "";
  return fmt::format("{}{}{}.r{}.{}", event.step == 0 ? 'p' : 'd', event.step, chunk, event.row,
                     event.name());
}

// {"n": ..., ...} of a tensor. Sums run in as many lanes as vectors of doubles have.
std::string statistics(std::span<const float> values) {
  constexpr size_t kLanes = 8;
  std::array<double, kLanes> largest{}, sum{}, squares{}, finite{}, nan{};
  const auto take = [&](float x, size_t lane) {
    const bool number = x == x, good = x - x == 0;
    const double value = good ? static_cast<double>(x) : 0.0;
    nan[lane] += number ? 0.0 : 1.0;
    finite[lane] += good ? 1.0 : 0.0;
    sum[lane] += value;
    squares[lane] += value * value;
    const double size = std::abs(value);
    largest[lane] = largest[lane] > size ? largest[lane] : size;
  };
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) take(values[i + lane], lane);
  }
  for (; i < values.size(); ++i) take(values[i], i % kLanes);
  const auto total = [](const std::array<double, kLanes>& lanes) {
    return std::accumulate(lanes.begin(), lanes.end(), 0.0);
  };
  const double count = total(finite), least_one = std::max(1.0, count);
  return fmt::format(R"({{"n":{},"nan":{:.0f},"inf":{:.0f},"absmax":{},"mean":{},"rms":{}}})", values.size(),
                     total(nan), static_cast<double>(values.size()) - count - total(nan),
                     *std::ranges::max_element(largest), total(sum) / least_one,
                     std::sqrt(total(squares) / least_one));
}

void write_text(const fs::path& path, const std::string& text) {
  const std::span<const std::byte> part = std::as_bytes(std::span(text));
  write_file(path, {&part, 1});
}

// What a trace consists of; the rest of its folder is the user's.
bool is_part(const fs::path& file) {
  const std::string name = file.filename().string();
  return name == "manifest.json" || name == "events.jsonl" || name == "floor.json" ||
         (name.starts_with("tensors-") && name.ends_with(".safetensors"));
}

bool is_trace(const fs::path& directory) {
  if (!is_file(directory / "manifest.json")) return false;
  std::ifstream file(directory / "manifest.json", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return text.find("lockstep-trace") != std::string::npos;
}

// What writers of this trace left that were killed.
void remove_abandoned(const fs::path& directory) {
  const std::string prefix = directory.filename().string() + ".partial-";
  std::error_code unreadable;
  const fs::path parent = directory.has_parent_path() ? directory.parent_path() : fs::path(".");
  for (const auto& each : fs::directory_iterator(parent, unreadable)) {
    const std::string name = each.path().filename().string();
    pid_t writer = 0;
    if (!name.starts_with(prefix)) continue;
    const char* end = name.data() + name.size();
    const auto [read, error] = std::from_chars(name.data() + prefix.size(), end, writer);
    if (error == std::errc() && read == end && ::kill(writer, 0) != 0 && errno == ESRCH)
      fs::remove_all(each.path(), unreadable);
  }
}

}  // namespace

TraceWriter::TraceWriter(const fs::path& directory, std::string precision, TraceStorage storage)
    : directory_(directory.lexically_normal()), precision_(std::move(precision)), storage_(storage) {
  if (!directory_.has_filename()) directory_ = directory_.parent_path();
  std::error_code refused;
  if (fs::exists(directory_, refused)) {
    const bool folder = fs::is_directory(directory_, refused);
    if (!folder || (!fs::is_empty(directory_, refused) && !is_trace(directory_)))
      fail(ErrorCode::invalid_argument,
           "[{}] -o: expected a new or empty directory or an earlier trace, got {}", directory_.string(),
           folder ? "a directory of other files" : "a file");
  }
  remove_abandoned(directory_);
  partial_ = fs::path(directory_.string() + ".partial-" + std::to_string(::getpid()));
  refused.clear();
  fs::create_directories(partial_, refused);
  lines_.open(partial_ / "events.jsonl", std::ios::binary);
  if (refused || !lines_)
    fail(ErrorCode::io, "[{}] create: expected a directory that can be written", directory_.string());
}

TraceWriter::~TraceWriter() {
  std::error_code ignored;
  if (!partial_.empty()) fs::remove_all(partial_, ignored);
}

// In a folder that is there already the earlier trace goes first, its manifest before all else, and the new
// manifest comes last: what is between is no trace.
void TraceWriter::put_in_place() {
  std::error_code refused;
  if (!is_there(directory_)) {
    fs::rename(partial_, directory_, refused);
  } else {
    fs::remove(directory_ / "manifest.json", refused);
    std::vector<fs::path> old = entries_of(directory_), made = entries_of(partial_);
    std::erase_if(old, [](const fs::path& file) { return !is_part(file); });
    std::ranges::stable_sort(made, {},
                             [](const fs::path& file) { return file.filename() == "manifest.json"; });
    for (const fs::path& each : old)
      if (!refused) fs::remove(each, refused);
    for (const fs::path& each : made)
      if (!refused) fs::rename(each, directory_ / each.filename(), refused);
  }
  if (refused)
    fail(ErrorCode::io, "[{}] write: expected a directory that can be written, got: {}", directory_.string(),
         refused.message());
}

std::string TraceWriter::shard_name() const { return fmt::format("tensors-{:05}.safetensors", shards_); }

void TraceWriter::add(const TraceEvent& event) {
  const std::string key = tensor_key(event);
  const int64_t width = event.shape[event.shape.rank() - 1];
  Pending kept{key, event.shape, {}};
  const bool whole = kept_whole(storage_, width, event.axes);
  if (whole) {
    kept.values.assign(event.values.begin(), event.values.end());
  } else {
    kept.values = reduce(event.values, width, storage_);
    kept.shape[kept.shape.rank() - 1] = storage_.count;
  }
  // By hand: a line a tensor, and building JSON values would take longer than computing many of them.
  lines_ << fmt::format(
      R"({{"seq":{},"parents":[{}],"phase":"{}","step":{},"chunk":{},"row":{},"pos":[{},{}],"layer":{},)"
      R"("site":{},"role":"out","axes":"{}","shape":[{}],"width":{},"dtype_stored":"f32","dtype_compute":"{}",)"
      R"("storage":"{}","tensor":"{}#{}","hash":"{}","stats":{}}})",
      events_, events_ > 0 ? std::to_string(events_ - 1) : "", event.step == 0 ? "prefill" : "decode",
      event.step, event.chunk, event.row, event.first_position, event.first_position + event.shape[0],
      event.layer == kNoLayer ? "null" : std::to_string(event.layer), json(event.site).dump(), event.axes,
      fmt::join(kept.shape.begin(), kept.shape.end(), ","), width, precision_,
      whole ? "full" : storage_name(storage_.kind), shard_name(), key, event.hash, statistics(event.values));
  lines_ << '\n';
  ++events_;
  sites_.insert(event.site);
  bytes_ += kept.values.size() * sizeof(float);
  pending_.push_back(std::move(kept));
  if (bytes_ >= kShardBytes) flush();
}

void TraceWriter::flush() {
  if (pending_.empty()) return;
  std::vector<NamedTensor> tensors;
  for (const Pending& each : pending_) {
    tensors.push_back({each.key, DType::f32, each.shape, std::as_bytes(std::span(each.values))});
  }
  save_tensors(partial_ / shard_name(), tensors);
  ++shards_;
  pending_.clear();
  bytes_ = 0;
}

void TraceWriter::finish(const Trace& facts) {
  flush();
  lines_.close();
  if (!lines_) fail(ErrorCode::io, "[{}] write: expected room for the events, got none", directory_.string());
  json rows = json::array();
  for (const Trace::Sequence& each : facts.sequences) rows.push_back({{"ids", each.ids}, {"fed", each.fed}});
  json ties = json::array();
  for (const Trace::Tie& each : facts.ties)
    ties.push_back({{"step", each.step},
                    {"row", each.row},
                    {"layer", each.layer},
                    {"position", each.position},
                    {"experts", each.experts}});
  const size_t space = facts.engine.find(' ');
  json storage = {{"kind", storage_name(storage_.kind)}};
  if (storage_.kind != TraceStorage::Kind::full)
    storage.update({{"count", storage_.count}, {"seed", storage_.seed}});
  const json manifest = {
      {"format", "lockstep-trace"},
      {"version", kTraceVersion},
      {"hash", kWordHash},
      {"engine", {{"name", facts.engine.substr(0, space)}, {"version", facts.engine.substr(space + 1)}}},
      {"policy", {{"precision", facts.precision}, {"kv_type", facts.kv_type}}},
      {"model",
       {{"architecture", facts.architecture},
        {"layers", facts.layers},
        {"config", json::parse(facts.config.empty() ? "{}" : facts.config)},
        {"unread_keys", facts.unread_keys},
        {"weights_sha256", facts.weights_sha256}}},
      {"level", facts.level},
      {"storage", storage},
      {"rows", rows},
      {"ties", ties},
      {"sites", sites_}};
  write_text(partial_ / "manifest.json", manifest.dump(1) + "\n");
  put_in_place();
}

void Trace::save(const fs::path& directory) const {
  TraceWriter writer(directory, precision, {});
  for (const TraceEvent& event : events_) writer.add(event);
  writer.finish(*this);
}

}  // namespace lockstep

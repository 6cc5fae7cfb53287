// Trace directories: reading and writing. Format: docs/trace-format.md.
#include <fmt/format.h>
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <sstream>

#include "format/json.h"
#include "format/safetensors.h"
#include "format/write_file.h"
#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "tensor/memory_map.h"
#include "trace/storage.h"
#include "trace/writer.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kVersion = 1;
constexpr size_t kShardBytes = size_t{64} << 20;
constexpr int64_t kMostSteps = 1 << 20;
constexpr std::string_view kAxes[] = {"T C", "T E", "T H D", "T H K", "T E C"};

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    fail(ErrorCode::not_found,
         "[{}] trace: expected this file, got none; is the directory a trace, and whole?", path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

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

// Parsed JSON, or an error that names the file and the line.
json parse(const std::string& text, const std::string& where) {
  json value = parse_json(text, where);
  if (!value.is_object())
    fail(ErrorCode::format, "[{}] JSON: expected an object, got something else; is the file cut short?",
         where);
  return value;
}

// What a key should hold, for messages.
template <typename T>
constexpr std::string_view type_name() {
  if constexpr (std::is_same_v<T, std::string>)
    return "a string";
  else if constexpr (std::is_integral_v<T>)
    return "a whole number";
  else if constexpr (std::is_same_v<T, std::vector<std::string>>)
    return "an array of strings";
  else if constexpr (std::is_same_v<T, std::map<std::string, std::string>>)
    return "an object of strings";
  else if constexpr (std::is_same_v<T, json>)
    return "a value";
  else
    return "an array of whole numbers";
}

// Reading with bounds: a missing key or another type is one line, not an exception of the JSON library.
template <typename T>
T get(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end())
    fail(ErrorCode::format, "[{}] {}: expected {}, got no such key", where, key, type_name<T>());
  try {
    return found->get<T>();
  } catch (const json::exception&) {
    fail(ErrorCode::format, "[{}] {}: expected {}, got {}", where, key, type_name<T>(),
         found->dump().substr(0, 40));
  }
}

TraceStorage read_storage(const json& storage, const std::string& where) {
  const auto kind = get<std::string>(storage, "kind", where);
  if (kind == "full") return {};
  return parse_storage(kind + ":" + std::to_string(get<int64_t>(storage, "count", where)),
                       get<uint64_t>(storage, "seed", where));
}

class Shards {
 public:
  explicit Shards(fs::path directory) : directory_(std::move(directory)) {}

  // "tensors-00000.safetensors#key"
  const SafeTensor& find(const std::string& reference, const std::string& where) {
    const size_t hash = reference.find('#');
    const std::string file = reference.substr(0, hash);
    if (hash == std::string::npos || !file.starts_with("tensors-") || file.find('/') != std::string::npos) {
      fail(ErrorCode::format, "[{}] tensor: expected FILE#KEY, got {}", where, reference);
    }
    auto shard = shards_.find(file);
    if (shard == shards_.end()) {
      Shard opened{std::make_shared<MemoryMap>(directory_ / file), {}};
      for (SafeTensor& tensor : read_safetensors(opened.map->bytes(), (directory_ / file).string()).tensors) {
        std::string name = tensor.name;
        opened.tensors.emplace(std::move(name), std::move(tensor));
      }
      shard = shards_.emplace(file, std::move(opened)).first;
    }
    const auto tensor = shard->second.tensors.find(reference.substr(hash + 1));
    if (tensor == shard->second.tensors.end()) {
      fail(ErrorCode::format, "[{}] tensor: expected {} in its file, got none", where, reference);
    }
    return tensor->second;
  }
  std::vector<std::shared_ptr<const void>> maps() const {
    std::vector<std::shared_ptr<const void>> all;
    for (const auto& [name, shard] : shards_) all.push_back(shard.map);
    return all;
  }

 private:
  struct Shard {
    std::shared_ptr<MemoryMap> map;
    std::map<std::string, SafeTensor> tensors;
  };
  fs::path directory_;
  std::map<std::string, Shard> shards_;
};

TraceEvent parse_event(const json& line, Shards& shards, const std::string& where) {
  TraceEvent event;
  const auto phase = get<std::string>(line, "phase", where);
  event.step = static_cast<int>(get<int64_t>(line, "step", where));
  event.row = static_cast<int>(get<int64_t>(line, "row", where));
  event.layer = line.contains("layer") && line["layer"].is_number_integer()
                    ? static_cast<int>(line["layer"].get<int64_t>())
                    : kNoLayer;
  event.site = get<std::string>(line, "site", where);
  if (!find_site(event.site)) {
    fail(ErrorCode::format, "[{}] site: expected one of docs/trace-format.md, such as q_rope; got {}", where,
         event.site);
  }
  event.axes = get<std::string>(line, "axes", where);
  event.hash = get<std::string>(line, "hash", where);
  const auto positions = get<std::vector<int64_t>>(line, "pos", where);
  if ((phase != "prefill" && phase != "decode") || (phase == "prefill") != (event.step == 0) ||
      event.step < 0 || event.step > kMostSteps || event.row < 0 || event.row > kMostSteps ||
      event.layer < kNoLayer || event.layer > kMostSteps || positions.size() != 2 || positions[0] < 0) {
    fail(ErrorCode::format,
         "[{}] event: expected phase, step, row, layer and positions that agree, got others", where);
  }
  event.first_position = positions[0];
  const SafeTensor& tensor = shards.find(get<std::string>(line, "tensor", where), where);
  if (tensor.dtype != DType::f32 || tensor.shape.rank() < 2 || tensor.shape.size() == 0 ||
      tensor.shape[0] != positions[1] - positions[0]) {
    fail(ErrorCode::format, "[{}] tensor: expected F32 with a row for each position, got {} {}", where,
         dtype_name(tensor.dtype), tensor.shape.str());
  }
  const auto axes = std::ranges::find(kAxes, event.axes);
  if (axes == std::end(kAxes) || tensor.shape.rank() != static_cast<int>(event.axes.size() + 1) / 2) {
    fail(ErrorCode::format,
         "[{}] axes: expected T C, T E, T H D, T H K or T E C for as many axes, got {} for {}", where,
         event.axes, tensor.shape.str());
  }
  event.shape = tensor.shape;
  const auto shape = get<std::vector<int64_t>>(line, "shape", where);
  if (!std::ranges::equal(shape, event.shape)) {
    fail(ErrorCode::format, "[{}] shape: expected that of its tensor, {}; got {}", where, event.shape.str(),
         json(shape).dump());
  }
  if (line.contains("width")) event.width = get<int64_t>(line, "width", where);
  if (event.width < 0 || (event.width > 0 && event.width < event.shape[event.shape.rank() - 1]))
    fail(ErrorCode::format, "[{}] width: expected at least what is kept, got {}", where, event.width);
  if (event.width == event.shape[event.shape.rank() - 1]) event.width = 0;
  if (reinterpret_cast<uintptr_t>(tensor.data.data()) % alignof(float) != 0) {
    fail(ErrorCode::format, "[{}] tensor: expected aligned values, got others", where);
  }
  event.values = {reinterpret_cast<const float*>(tensor.data.data()),
                  static_cast<size_t>(tensor.shape.size())};
  return event;
}

// A declared site without an event, or an event twice, means that the capture went wrong.
void check_complete(const Trace& trace) {
  if (trace.events().empty())
    fail(ErrorCode::format, "[{}] events: expected at least one, got none", trace.where);
  std::set<std::tuple<int, int, int, std::string, int64_t>> seen;
  std::set<std::string> sites;
  for (const TraceEvent& event : trace.events()) {
    if (!seen.emplace(event.step, event.row, event.layer, event.site, event.first_position).second) {
      fail(ErrorCode::format, "[{}] events: expected each site once a pass, got step {}, row {}, {} twice",
           trace.where, event.step, event.row, event.name());
    }
    sites.insert(event.site);
    const auto row = static_cast<size_t>(event.row);
    if (row >= trace.sequences.size() || static_cast<size_t>(event.step) > trace.sequences[row].fed.size()) {
      fail(
          ErrorCode::format,
          "[{}] events: expected steps of the manifest's rows, prompt and what is fed, got step {} of row {}",
          trace.where, event.step, event.row);
    }
  }
  for (const std::string& site : trace.sites) {
    if (!sites.contains(site))
      fail(ErrorCode::format, "[{}] events: expected some of the declared site {}, got none", trace.where,
           site);
  }
}

}  // namespace

std::string TraceEvent::name() const {
  return layer == kNoLayer ? site : fmt::format("L{:02}.{}", layer, site);
}

std::string trace_hash(std::span<const float> values) {
  // FNV-1a over words: tensors hold whole floats.
  uint64_t hash = 0xCBF29CE484222325U;
  for (const float value : values) hash = (hash ^ std::bit_cast<uint32_t>(value)) * 0x100000001B3U;
  return fmt::format("{:016x}", hash);
}

void Trace::add(TraceEvent event, std::span<const float> values) {
  auto copy = std::make_shared<std::vector<float>>(values.begin(), values.end());
  event.values = *copy;
  event.hash = trace_hash(event.values);
  storage_.push_back(std::move(copy));
  events_.push_back(std::move(event));
}

void Trace::take_events(Trace&& other) {
  events_ = std::move(other.events_);
  storage_ = std::move(other.storage_);
}

Trace Trace::open(const fs::path& directory) {
  Trace trace;
  trace.where = directory.string();
  const std::string manifest_name = (directory / "manifest.json").string();
  const json manifest = parse(contents(manifest_name), manifest_name);
  if (get<std::string>(manifest, "format", manifest_name) != "lockstep-trace" ||
      get<int64_t>(manifest, "version", manifest_name) != kVersion) {
    fail(ErrorCode::format, "[{}] format: expected lockstep-trace of version {}, got another", manifest_name,
         kVersion);
  }
  const json engine = get<json>(manifest, "engine", manifest_name);
  trace.engine = get<std::string>(engine, "name", manifest_name) + " " +
                 get<std::string>(engine, "version", manifest_name);
  const json policy = get<json>(manifest, "policy", manifest_name);
  trace.precision = get<std::string>(policy, "precision", manifest_name);
  trace.kv_type = get<std::string>(policy, "kv_type", manifest_name);
  if (manifest.contains("storage")) trace.storage = read_storage(manifest["storage"], manifest_name);
  const json model = get<json>(manifest, "model", manifest_name);
  trace.architecture = get<std::string>(model, "architecture", manifest_name);
  trace.layers = get<int64_t>(model, "layers", manifest_name);
  trace.config = get<json>(model, "config", manifest_name).dump();
  if (model.contains("unread_keys"))
    trace.unread_keys = get<std::vector<std::string>>(model, "unread_keys", manifest_name);
  if (model.contains("weights_sha256"))
    trace.weights_sha256 = get<std::map<std::string, std::string>>(model, "weights_sha256", manifest_name);
  trace.level = static_cast<int>(get<int64_t>(manifest, "level", manifest_name));
  if (trace.level < 0 || trace.level > 3)
    fail(ErrorCode::format, "[{}] level: expected 0 to 3, got {}", manifest_name, trace.level);
  trace.sites = get<std::vector<std::string>>(manifest, "sites", manifest_name);
  for (const json& row : get<json>(manifest, "rows", manifest_name)) {
    trace.sequences.push_back({get<std::vector<int32_t>>(row, "ids", manifest_name),
                               get<std::vector<int32_t>>(row, "fed", manifest_name)});
  }
  Shards shards(directory);
  std::istringstream lines(contents(directory / "events.jsonl"));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = (directory / "events.jsonl").string() + ": line " + std::to_string(++number);
    trace.events_.push_back(parse_event(parse(line, where), shards, where));
  }
  trace.storage_ = shards.maps();
  check_complete(trace);
  return trace;
}

TraceWriter::TraceWriter(fs::path directory, std::string precision, TraceStorage storage)
    : directory_(std::move(directory)), precision_(std::move(precision)), storage_(storage) {
  std::error_code refused;
  fs::create_directories(directory_, refused);
  // The manifest is written last: a trace without one is not whole.
  // What is left of an earlier one, its floor included, does not belong to this.
  if (!refused) {
    std::vector<fs::path> old;
    for (const auto& each : fs::directory_iterator(directory_, refused)) {
      const std::string name = each.path().filename().string();
      if (name == "manifest.json" || name == "floor.json" ||
          (name.starts_with("tensors-") && name.ends_with(".safetensors")))
        old.push_back(each.path());
    }
    for (const fs::path& each : old) fs::remove(each, refused);
  }
  lines_.open(directory_ / "events.jsonl", std::ios::binary);
  if (refused || !lines_)
    fail(ErrorCode::io, "[{}] create: expected a directory that can be written", directory_.string());
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
  save_tensors(directory_ / shard_name(), tensors);
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
  const size_t space = facts.engine.find(' ');
  json storage = {{"kind", storage_name(storage_.kind)}};
  if (storage_.kind != TraceStorage::Kind::full)
    storage.update({{"count", storage_.count}, {"seed", storage_.seed}});
  const json manifest = {
      {"format", "lockstep-trace"},
      {"version", kVersion},
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
      {"sites", sites_}};
  write_text(directory_ / "manifest.json", manifest.dump(1) + "\n");
}

void Trace::save(const fs::path& directory) const {
  TraceWriter writer(directory, precision, {});
  for (const TraceEvent& event : events_) writer.add(event);
  writer.finish(*this);
}

}  // namespace lockstep

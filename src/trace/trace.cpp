// Trace directories: reading. Format: docs/trace-format.md.
#include <fmt/format.h>
#include <algorithm>
#include <bit>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "format/json.h"
#include "format/safetensors.h"
#include "format/sha256.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "tensor/memory_map.h"
#include "trace/storage.h"
#include "trace/writer.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kMostSteps = 1 << 20;
constexpr int64_t kWidest = int64_t{1} << 24;
constexpr std::string_view kPrecisions[] = {"f32", "f16", "bf16", "exact", "fast", "q8"};
constexpr std::string_view kKvTypes[] = {"f32", "f16", "bf16", "i16", "q8"};
constexpr std::string_view kAxes[] = {"T C", "T E", "T H D", "T H K", "T E C"};

// A pipe would wait for ever, and a directory has no bytes.
void require_file(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored))
    fail(ErrorCode::not_found,
         "[{}] trace: expected this file, got none; is the directory a trace, and whole?", path.string());
  if (!fs::is_regular_file(path, ignored))
    fail(ErrorCode::not_found, "[{}] trace: expected a regular file, got another kind", path.string());
}

std::string contents(const fs::path& path) {
  require_file(path);
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(ErrorCode::not_found, "[{}] trace: expected a readable file, got another", path.string());
  return {std::istreambuf_iterator<char>(file), {}};
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

// Whether a number is whole and of the type; the JSON library would cut it to fit.
template <typename T>
bool fits(const json& value) {
  if constexpr (std::is_integral_v<T>) {
    if (value.is_number_unsigned()) return std::in_range<T>(value.get<uint64_t>());
    return value.is_number_integer() && std::in_range<T>(value.get<int64_t>());
  } else if constexpr (requires {
                         requires std::is_integral_v<typename T::value_type>;
                         typename T::allocator_type;
                       } && !std::is_same_v<T, std::string>) {
    return value.is_array() && std::ranges::all_of(value, fits<typename T::value_type>);
  } else {
    return true;
  }
}

// Reading with bounds: a missing key or another type is one line, not an exception of the JSON library.
template <typename T>
T get(const json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end())
    fail(ErrorCode::format, "[{}] {}: expected {}, got no such key", where, key, type_name<T>());
  try {
    if constexpr (!std::is_same_v<T, json>) {
      if (!fits<T>(*found)) throw json::type_error::create(302, "", nullptr);
    }
    return found->get<T>();
  } catch (const json::exception&) {
    fail(ErrorCode::format, "[{}] {}: expected {}, got {}", where, key, type_name<T>(),
         found->dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 40));
  }
}

// One of a few names.
std::string get_name(const json& object, const char* key, std::span<const std::string_view> known,
                     const std::string& where) {
  std::string name = get<std::string>(object, key, where);
  if (std::ranges::find(known, name) == known.end())
    fail(ErrorCode::format, "[{}] {}: expected one of {}, got {}", where, key, fmt::join(known, ", "), name);
  return name;
}

TraceStorage read_storage(const json& storage, const std::string& where) {
  const auto kind = get<std::string>(storage, "kind", where);
  if (kind == "full") return {};
  return parse_storage(kind + ":" + std::to_string(get<int64_t>(storage, "count", where)),
                       get<uint64_t>(storage, "seed", where));
}

std::vector<Trace::Tie> read_ties(const json& ties, const std::string& where) {
  std::vector<Trace::Tie> all;
  if (!ties.is_array()) fail(ErrorCode::format, "[{}] ties: expected an array, got another value", where);
  for (const json& each : ties) {
    all.push_back({get<int>(each, "step", where), get<int>(each, "row", where),
                   get<int>(each, "layer", where), get<int64_t>(each, "position", where),
                   get<std::vector<int>>(each, "experts", where)});
  }
  return all;
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
      require_file(directory_ / file);
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

// `whole`: the trace says that it keeps whole rows.
TraceEvent parse_event(const json& line, bool whole, Shards& shards, const std::string& where) {
  TraceEvent event;
  const auto phase = get<std::string>(line, "phase", where);
  event.step = get<int>(line, "step", where);
  event.row = get<int>(line, "row", where);
  event.layer =
      line.contains("layer") && !line["layer"].is_null() ? get<int>(line, "layer", where) : kNoLayer;
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
  const int64_t kept = event.shape[event.shape.rank() - 1];
  if (event.width != 0 && (event.width < kept || event.width > kWidest || (whole && event.width != kept)))
    fail(ErrorCode::format, "[{}] width: expected {}, got {}", where,
         whole ? "what is kept, as all is" : "from what is kept to 2^24", event.width);
  if (event.width == event.shape[event.shape.rank() - 1]) event.width = 0;
  if (reinterpret_cast<uintptr_t>(tensor.data.data()) % alignof(float) != 0) {
    fail(ErrorCode::format, "[{}] tensor: expected aligned values, got others", where);
  }
  event.values = {reinterpret_cast<const float*>(tensor.data.data()),
                  static_cast<size_t>(tensor.shape.size())};
  return event;
}

// Each site once for each position, of a layer and tokens that there are.
void check_place(const Trace& trace, const TraceEvent& event) {
  if (trace.layers > 0 && event.layer >= trace.layers)
    fail(ErrorCode::format, "[{}] events: expected layers 0 to {}, got {}", trace.where, trace.layers - 1,
         event.name());
  const auto row = static_cast<size_t>(event.row);
  if (row >= trace.sequences.size() || static_cast<size_t>(event.step) > trace.sequences[row].fed.size()) {
    fail(ErrorCode::format,
         "[{}] events: expected steps of the manifest's rows, prompt and what is fed, got step {} of row {}",
         trace.where, event.step, event.row);
  }
  const auto prompt = static_cast<int64_t>(trace.sequences[row].ids.size());
  const int64_t begin = event.step == 0 ? 0 : prompt + event.step - 1;
  const int64_t end = event.step == 0 ? prompt : begin + 1;
  if (event.first_position < begin || event.first_position + event.shape[0] > end)
    fail(ErrorCode::format, "[{}] events: expected positions {} to {} of step {}, row {}, got {} to {} at {}",
         trace.where, begin, end, event.step, event.row, event.first_position,
         event.first_position + event.shape[0], event.name());
}

// Rows of a site are alike throughout, but for the number of keys.
void check_shape(const Trace& trace, const TraceEvent& event,
                 std::map<std::string, const TraceEvent*>& first) {
  const auto& before = *first.emplace(event.name(), &event).first->second;
  const int axes = event.axes == "T H K" ? 2 : event.shape.rank();
  bool alike = event.axes == before.axes && event.shape.rank() == before.shape.rank() &&
               (event.axes == "T H K" || event.width == before.width);
  for (int axis = 1; axis < axes && alike; ++axis) alike = event.shape[axis] == before.shape[axis];
  if (!alike)
    fail(ErrorCode::format, "[{}] events: expected rows of {} to be alike, got {} {} and {} {}", trace.where,
         event.name(), before.axes, before.shape.str(), event.axes, event.shape.str());
}

// Ties lie in the passes that there are, and name experts that there are.
void check_ties(const Trace& trace) {
  std::set<std::tuple<int, int, int, int64_t>> seen;
  std::map<int, int64_t> experts;  // of a layer
  for (const TraceEvent& event : trace.events())
    if (event.site == "router_weights") experts[event.layer] = event.shape[1];
  for (const Trace::Tie& tie : trace.ties) {
    const auto row = static_cast<size_t>(tie.row);
    bool good = row < trace.sequences.size() && tie.layer >= 0 &&
                (trace.layers == 0 || tie.layer < trace.layers) && tie.step >= 0 && !tie.experts.empty() &&
                seen.emplace(tie.step, tie.row, tie.layer, tie.position).second;
    if (good) {
      const auto prompt = static_cast<int64_t>(trace.sequences[row].ids.size());
      const auto fed = static_cast<int64_t>(trace.sequences[row].fed.size());
      good = tie.step == 0 ? tie.position >= 0 && tie.position < prompt
                           : tie.step <= fed && tie.position == prompt + tie.step - 1;
    }
    const auto known = experts.find(tie.layer);
    const int64_t count = known == experts.end() ? kMostSteps : known->second;
    good = good && std::ranges::is_sorted(tie.experts, std::less_equal<>()) &&
           std::ranges::all_of(tie.experts, [&](int expert) { return expert >= 0 && expert < count; });
    if (!good)
      fail(ErrorCode::format,
           "[{}] ties: expected each a step, row, layer and position of the trace, once, with the experts "
           "that were chosen, ascending; got step {}, row {}, layer {}, position {}",
           trace.where, tie.step, tie.row, tie.layer, tie.position);
  }
}

// A declared site without an event, or a position twice, means that the capture went wrong.
void check_complete(const Trace& trace) {
  if (trace.events().empty())
    fail(ErrorCode::format, "[{}] events: expected at least one, got none", trace.where);
  if (trace.sites.empty())
    fail(ErrorCode::format, "[{}] sites: expected those recorded, got none", trace.where);
  std::map<std::tuple<int, int, int, std::string>, std::map<int64_t, int64_t>> seen;  // first to past last
  std::set<std::string> sites;
  std::map<std::string, const TraceEvent*> shapes;
  for (const TraceEvent& event : trace.events()) {
    check_place(trace, event);
    check_shape(trace, event, shapes);
    auto& parts = seen[{event.step, event.row, event.layer, event.site}];
    const auto [at, is_new] = parts.emplace(event.first_position, event.first_position + event.shape[0]);
    const bool overlaps = !is_new || (at != parts.begin() && std::prev(at)->second > at->first) ||
                          (std::next(at) != parts.end() && std::next(at)->first < at->second);
    if (overlaps) {
      fail(ErrorCode::format,
           "[{}] events: expected each position of a site once, got step {}, row {}, {} twice", trace.where,
           event.step, event.row, event.name());
    }
    sites.insert(event.site);
  }
  for (const std::string& site : trace.sites) {
    if (!sites.contains(site))
      fail(ErrorCode::format, "[{}] events: expected some of the declared site {}, got none", trace.where,
           site);
  }
}

// The hash of an event by a rule that we know.
std::string hash_by(std::string_view rule, const TraceEvent& event) {
  if (rule == kWordHash) return trace_hash(event.values);
  Sha256 sum;
  sum.add(std::as_bytes(event.values));
  return sum.hex().substr(0, 16);
}

// The rule that the manifest names, or the one that one of the first events follows; none: the hashes are
// another engine's own, and only tell equal from unequal.
std::string_view hash_rule(const json& manifest, const Trace& trace, const std::string& where) {
  static constexpr std::string_view kRules[] = {kWordHash, kByteHash};
  if (manifest.contains("hash")) {
    const auto named = get<std::string>(manifest, "hash", where);
    const auto* known = std::ranges::find(kRules, named);
    return known == std::end(kRules) ? std::string_view() : *known;
  }
  constexpr size_t kTried = 3;
  for (size_t i = 0; i < std::min(kTried, trace.events().size()); ++i) {
    for (const std::string_view rule : kRules) {
      if (hash_by(rule, trace.events()[i]) == trace.events()[i].hash) return rule;
    }
  }
  return {};
}

// The bytes of each event against its hash. Ours is of the whole row, kept or not.
void check_hashes(std::string_view rule, const Trace& trace, std::span<const std::string> tensors) {
  for (size_t i = 0; i < tensors.size() && !rule.empty(); ++i) {
    const TraceEvent& event = trace.events()[i];
    if ((rule == kWordHash && event.width > 0) || hash_by(rule, event) == event.hash) continue;
    fail(ErrorCode::format,
         "[{}] {}: expected values of hash {}, got others: the file was damaged or changed", trace.where,
         tensors[i], event.hash);
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
      get<int64_t>(manifest, "version", manifest_name) != kTraceVersion) {
    fail(ErrorCode::format, "[{}] format: expected lockstep-trace of version {}, got another", manifest_name,
         kTraceVersion);
  }
  const json engine = get<json>(manifest, "engine", manifest_name);
  trace.engine = get<std::string>(engine, "name", manifest_name) + " " +
                 get<std::string>(engine, "version", manifest_name);
  const json policy = get<json>(manifest, "policy", manifest_name);
  trace.precision = get_name(policy, "precision", kPrecisions, manifest_name);
  trace.kv_type = get_name(policy, "kv_type", kKvTypes, manifest_name);
  if (manifest.contains("storage")) trace.storage = read_storage(manifest["storage"], manifest_name);
  const json model = get<json>(manifest, "model", manifest_name);
  trace.architecture = get<std::string>(model, "architecture", manifest_name);
  trace.layers = get<int64_t>(model, "layers", manifest_name);
  if (trace.layers < 0 || trace.layers > kMostSteps)
    fail(ErrorCode::format, "[{}] layers: expected 0 to {}, got {}", manifest_name, kMostSteps, trace.layers);
  trace.config = get<json>(model, "config", manifest_name).dump();
  if (model.contains("unread_keys"))
    trace.unread_keys = get<std::vector<std::string>>(model, "unread_keys", manifest_name);
  if (model.contains("weights_sha256"))
    trace.weights_sha256 = get<std::map<std::string, std::string>>(model, "weights_sha256", manifest_name);
  trace.level = get<int>(manifest, "level", manifest_name);
  if (trace.level < 0 || trace.level > 3)
    fail(ErrorCode::format, "[{}] level: expected 0 to 3, got {}", manifest_name, trace.level);
  trace.sites = get<std::vector<std::string>>(manifest, "sites", manifest_name);
  for (const json& row : get<json>(manifest, "rows", manifest_name)) {
    trace.sequences.push_back({get<std::vector<int32_t>>(row, "ids", manifest_name),
                               get<std::vector<int32_t>>(row, "fed", manifest_name)});
    const Trace::Sequence& read = trace.sequences.back();
    const auto is_id = [](int32_t id) { return id >= 0; };
    if (!std::ranges::all_of(read.ids, is_id) || !std::ranges::all_of(read.fed, is_id))
      fail(ErrorCode::format, "[{}] ids: expected none below 0, got one", manifest_name);
  }
  if (manifest.contains("ties")) trace.ties = read_ties(manifest["ties"], manifest_name);
  Shards shards(directory);
  std::istringstream lines(contents(directory / "events.jsonl"));
  int64_t number = 0;
  const bool whole = trace.storage.kind == TraceStorage::Kind::full;
  std::vector<std::string> tensors;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = (directory / "events.jsonl").string() + ": line " + std::to_string(++number);
    const json object = parse(line, where);
    trace.events_.push_back(parse_event(object, whole, shards, where));
    tensors.push_back(get<std::string>(object, "tensor", where));
  }
  trace.storage_ = shards.maps();
  check_complete(trace);
  check_ties(trace);
  check_hashes(hash_rule(manifest, trace, manifest_name), trace, tensors);
  return trace;
}

}  // namespace lockstep

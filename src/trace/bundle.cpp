// One operation in one file: inputs, weight, expected output and floor, to be run again anywhere.
#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "cache/kv_cache.h"
#include "format/json.h"
#include "format/safetensors.h"
#include "generate/batch.h"
#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"
#include "nn/attention.h"
#include "nn/linear.h"
#include "nn/mlp.h"
#include "nn/norm.h"
#include "nn/rope.h"
#include "nn/rows.h"
#include "quant/blocks.h"
#include "quant/pack.h"
#include "tensor/fail.h"
#include "tensor/memory_map.h"
#include "trace/compare.h"
#include "trace/inject.h"
#include "trace/passes.h"

namespace lockstep {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int kVersion = 1;
constexpr const char* kKey = "lockstep-bundle";  // of the metadata

// How a site is computed: which operation, from which sites of the same layer, with which weight.
struct Recipe {
  std::string op;
  std::vector<std::string> inputs;
  std::vector<std::string> weights;  // the first of these names that the checkpoint has
  bool every_step = false;           // inputs of all positions up to the rows' own, not of the pass alone
};

std::optional<Recipe> recipe(const std::string& site, bool experts) {
  const std::map<std::string, Recipe> known = {
      {"embed", {"embedding", {}, {"model.embed_tokens.weight"}}},
      {"attn_norm", {"rms_norm", {"residual"}, {"input_layernorm.weight"}}},
      {"q_proj", {"linear", {"attn_norm"}, {"self_attn.q_proj.weight"}}},
      {"k_proj", {"linear", {"attn_norm"}, {"self_attn.k_proj.weight"}}},
      {"v_proj", {"linear", {"attn_norm"}, {"self_attn.v_proj.weight"}}},
      {"q_rope", {"rope", {"q_proj"}, {"rope_freqs.weight"}}},
      {"k_rope", {"rope", {"k_proj"}, {"rope_freqs.weight"}}},
      {"attn_ctx", {"attention", {"q_rope", "k_rope", "v_proj"}, {}, true}},
      {"o_proj", {"linear", {"attn_ctx"}, {"self_attn.o_proj.weight"}}},
      {"attn_resid", {"add", {"residual", "o_proj"}, {}}},
      {"ffn_norm", {"rms_norm", {"attn_resid"}, {"post_attention_layernorm.weight"}}},
      {"router_logits", {"linear", {"ffn_norm"}, {"block_sparse_moe.gate.weight", "mlp.gate.weight"}}},
      {"router_weights", {"router", {"router_logits"}, {}}},
      {"gate", {"linear", {"ffn_norm"}, {"mlp.gate_proj.weight"}}},
      {"up", {"linear", {"ffn_norm"}, {"mlp.up_proj.weight"}}},
      {"act", {"silu_mul", {"gate", "up"}, {}}},
      {"down", {"linear", {"act"}, {"mlp.down_proj.weight"}}},
      {"ffn_resid", {"add", {"attn_resid", experts ? "moe_out" : "down"}, {}}},
      {"final_norm", {"rms_norm", {"residual"}, {"model.norm.weight"}}},
      {"logits", {"linear", {"final_norm"}, {"lm_head.weight", "model.embed_tokens.weight"}}}};
  const auto found = known.find(site);
  return found == known.end() ? std::nullopt : std::optional(found->second);
}

// Rows of one site, gathered from the events of a trace.
struct Gathered {
  Shape shape;
  std::vector<float> values;
  std::vector<int32_t> positions;
};
Gathered gather(const Trace& trace, int layer, const std::string& site, int row, int step, bool every_step) {
  Gathered all;
  std::map<int64_t, std::span<const float>> rows;
  for (const TraceEvent& event : trace.events()) {
    if (event.site != site || event.layer != layer || event.row != row) continue;
    if (every_step ? event.step > step : event.step != step) continue;
    all.shape = event.shape;
    const auto width = event.values.size() / static_cast<size_t>(event.shape[0]);
    for (int64_t t = 0; t < event.shape[0]; ++t)
      rows[event.first_position + t] = event.values.subspan(static_cast<size_t>(t) * width, width);
  }
  if (rows.empty())
    fail(ErrorCode::invalid_argument,
         "[bundle] inputs: expected {} of layer {}, step {} in the trace, got none", site, layer, step);
  for (const auto& [position, values] : rows) {
    all.positions.push_back(static_cast<int32_t>(position));
    all.values.insert(all.values.end(), values.begin(), values.end());
  }
  all.shape[0] = static_cast<int64_t>(rows.size());
  return all;
}

// What enters a layer: the end of the one before, or the embedding.
std::pair<int, std::string> site_of(const std::string& input, int layer, int64_t layers) {
  if (input != "residual") return {input == "final_norm" ? kNoLayer : layer, input};
  if (layer == kNoLayer) return {static_cast<int>(layers) - 1, "ffn_resid"};
  return layer == 0 ? std::pair<int, std::string>{kNoLayer, "embed"}
                    : std::pair<int, std::string>{layer - 1, "ffn_resid"};
}

struct File {
  std::vector<NamedTensor> tensors;
  std::vector<std::unique_ptr<std::vector<float>>> kept;

  void add(const std::string& name, const Gathered& rows) {
    kept.push_back(std::make_unique<std::vector<float>>(rows.values));
    tensors.push_back({name, DType::f32, rows.shape, std::as_bytes(std::span(*kept.back()))});
  }
  void add(const std::string& name, std::span<const std::byte> bytes) {
    tensors.push_back({name, DType::u8, Shape{static_cast<int64_t>(bytes.size())}, bytes});
  }
};

// A stored weight as bytes and the JSON that says what they are.
json add_weight(File& file, const StoredTensor& weight) {
  file.add("weight", weight.data);
  if (!weight.scales.empty()) file.add("weight.scales", weight.scales);
  if (!weight.biases.empty()) file.add("weight.biases", weight.biases);
  return {{"name", weight.name},
          {"dtype", dtype_name(weight.dtype)},
          {"shape", std::vector<int64_t>(weight.shape.begin(), weight.shape.end())},
          {"group_size", weight.group_size},
          {"scale_dtype", dtype_name(weight.scale_dtype)},
          {"interleaved_heads", weight.interleaved_heads}};
}

class Reader {
 public:
  explicit Reader(const fs::path& path) : where_(path.string()), map_(path) {
    SafeTensors parsed = read_safetensors(map_.bytes(), where_);
    const auto text = parsed.metadata.find(kKey);
    if (text == parsed.metadata.end())
      fail(ErrorCode::format, "[{}] bundle: expected a file that lockstep replay --bundle wrote, got another",
           where_);
    facts = parse_json(text->second, where_);
    for (SafeTensor& tensor : parsed.tensors) tensors_.emplace(tensor.name, std::move(tensor));
    if (get<int>("version") != kVersion)
      fail(ErrorCode::format, "[{}] version: expected {}, got another", where_, kVersion);
  }
  template <typename T>
  T get(const char* key) const {
    return get_from<T>(facts, key);
  }
  template <typename T>
  T get_from(const json& object, const char* key) const {
    try {
      return object.at(key).get<T>();
    } catch (const json::exception&) {
      fail(ErrorCode::format, "[{}] {}: expected a value of its type, got none", where_, key);
    }
  }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  std::span<const std::byte> bytes(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end())
      fail(ErrorCode::format, "[{}] {}: expected this tensor, got none", where_, name);
    return found->second.data;
  }
  Tensor tensor(const std::string& name, int rank_least = 2) const {
    const std::span<const std::byte> data = bytes(name);
    const SafeTensor& stored = tensors_.at(name);
    if (stored.dtype != DType::f32 || stored.shape.rank() < rank_least || stored.shape.size() == 0)
      fail(ErrorCode::format, "[{}] {}: expected F32 of at least {} axes, got {} {}", where_, name,
           rank_least, dtype_name(stored.dtype), stored.shape.str());
    Tensor values(stored.shape);
    std::memcpy(values.data(), data.data(), data.size());
    return values;
  }
  // The weight as it lay in the model's file; its size is checked.
  StoredTensor weight() const {
    const auto about = get<json>("weight");
    StoredTensor stored;
    stored.name = get_from<std::string>(about, "name");
    stored.source = where_ + ": " + stored.name;
    stored.dtype = dtype_of(get_from<std::string>(about, "dtype"));
    const auto axes = get_from<std::vector<int64_t>>(about, "shape");
    const bool sane = !axes.empty() && axes.size() <= 2 &&
                      std::ranges::all_of(axes, [](int64_t n) { return n > 0 && n < int64_t{1} << 31; });
    if (!sane) fail(ErrorCode::format, "[{}] weight: expected one or two axes, got others", where_);
    stored.shape = axes.size() == 1 ? Shape{axes[0]} : Shape{axes[0], axes[1]};
    stored.data = bytes("weight");
    stored.group_size = get_from<int64_t>(about, "group_size");
    stored.scale_dtype = dtype_of(get_from<std::string>(about, "scale_dtype"));
    stored.interleaved_heads = get_from<int64_t>(about, "interleaved_heads");
    if (has("weight.scales")) stored.scales = bytes("weight.scales");
    if (has("weight.biases")) stored.biases = bytes("weight.biases");
    const bool heads_fit = stored.interleaved_heads >= 0 &&
                           (stored.interleaved_heads == 0 || axes[0] % (2 * stored.interleaved_heads) == 0);
    const bool blocks_fit = is_weight(stored.dtype) && axes.back() % dtype_block(stored.dtype) == 0;
    if (!heads_fit || !blocks_fit ||
        static_cast<int64_t>(stored.data.size()) != stored.rows() * stored.row_bytes() || !scales_fit(stored))
      fail(ErrorCode::format, "[{}] weight: expected the bytes of {} {}, got {}", where_,
           dtype_name(stored.dtype), stored.shape.str(), stored.data.size());
    return stored;
  }
  std::vector<float> vector() const {
    const StoredTensor stored = weight();
    std::vector<float> values(static_cast<size_t>(stored.columns()));
    quant::dequantise_row(stored, 0, values.data());
    return values;
  }
  const std::string& where() const { return where_; }

  json facts;

 private:
  DType dtype_of(const std::string& name) const {
    if (const auto known = find_dtype(name)) return *known;
    fail(ErrorCode::format, "[{}] dtype: expected an element type, got {}", where_, name);
  }
  static bool is_plain(DType dtype) {
    return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  }
  static bool is_weight(DType dtype) { return is_plain(dtype) || quant::code_format(dtype).bits > 0; }
  static bool scales_fit(const StoredTensor& stored) {
    const int64_t group = stored.group_size;
    if (stored.dtype != DType::mlx_q4 && stored.dtype != DType::mlx_q8)
      return group == 0 && stored.scales.empty() && stored.biases.empty();
    if ((group != 32 && group != 64 && group != 128) || stored.columns() % group != 0 ||
        !is_plain(stored.scale_dtype))
      return false;
    const auto bytes = static_cast<size_t>(stored.rows() * (stored.columns() / group) *
                                           dtype_block_bytes(stored.scale_dtype));
    return stored.scales.size() == bytes && stored.biases.size() == bytes;
  }

  std::string where_;
  MemoryMap map_;
  std::map<std::string, SafeTensor> tensors_;
};

void require(bool fits, const Reader& bundle, const char* what) {
  if (!fits)
    fail(ErrorCode::format, "[{}] {}: expected shapes that fit each other, got others", bundle.where(), what);
}

Tensor run_attention(const Reader& bundle, const nn::Runtime& runtime, KvType kv_type) {
  const Tensor q = bundle.tensor("input.q_rope", 3), k = bundle.tensor("input.k_rope", 3);
  const Tensor v = bundle.tensor("input.v_proj", 3);
  const int64_t keys = k.shape()[0], rows = q.shape()[0], heads = k.shape()[1], dim = k.shape()[2];
  const auto window = bundle.get<int64_t>("window");
  require(v.shape() == k.shape() && q.shape()[2] == dim && q.shape()[1] % heads == 0 && rows <= keys &&
              window >= 0,
          bundle, "attention");
  KvCache cache({1, heads, dim, {window}}, kv_type);
  for (int64_t t = 0; t < keys; ++t) cache.write(0, t, k.row(t), v.row(t), *runtime.kernels);
  const Run run{&cache, 0, rows, keys - rows, keys};
  Taps none;
  return nn::attention(q, {{&run, 1}, 0}, bundle.get<float>("scale"), runtime, none);
}

Tensor run_rope(const Reader& bundle, const nn::Runtime& runtime) {
  std::vector<std::string> inputs = bundle.get<std::vector<std::string>>("inputs");
  require(inputs.size() == 1, bundle, "inputs");
  Tensor x = bundle.tensor("input." + inputs[0], 3);
  const Config config(bundle.get<json>("config").dump(), bundle.where());
  nn::RoPE rope(config, x.shape()[2], bundle.get<double>("theta"));
  if (bundle.has("weight")) {
    const std::vector<float> divisors = bundle.vector();
    require(static_cast<int64_t>(divisors.size()) == rope.pairs(), bundle, "rope");
    rope.divide(divisors);
  }
  Batch batch;
  batch.positions = bundle.get<std::vector<int32_t>>("positions");
  require(static_cast<int64_t>(batch.positions.size()) == x.shape()[0], bundle, "positions");
  batch.ids.resize(batch.positions.size());
  batch.runs.push_back({nullptr, 0, x.shape()[0], batch.positions[0], bundle.get<int64_t>("context")});
  nn::rotate(x, rope.table(batch, runtime), runtime);
  return x;
}

Tensor run_linear(const Reader& bundle, const nn::Runtime& runtime, const std::string& input) {
  Tensor given = bundle.tensor("input." + input);
  const Shape rows{given.shape()[0], given.row_size()};
  const Tensor x = std::move(given).reshaped(rows);
  const StoredTensor weight = bundle.weight();
  require(weight.shape.rank() == 2 && x.row_size() == weight.columns(), bundle, "linear");
  nn::Linear layer;
  layer.runtime = &runtime;
  layer.weight = quant::pack_tensors({&weight, 1}, *runtime.pool);
  if (bundle.has("bias")) {
    const Tensor bias = bundle.tensor("bias", 1);
    require(bias.size() == weight.rows(), bundle, "bias");
    layer.bias.assign(bias.data(), bias.data() + bias.size());
  }
  return nn::linear(x, layer);
}

Tensor run_operation(const Reader& bundle, const nn::Runtime& runtime, KvType kv_type) {
  const auto op = bundle.get<std::string>("op");
  const auto inputs = bundle.get<std::vector<std::string>>("inputs");
  const auto input = [&](size_t i) {
    require(i < inputs.size(), bundle, "inputs");
    return bundle.tensor("input." + inputs[i]);
  };
  if (op == "linear") return run_linear(bundle, runtime, inputs.empty() ? "" : inputs[0]);
  if (op == "rope") return run_rope(bundle, runtime);
  if (op == "attention") return run_attention(bundle, runtime, kv_type);
  if (op == "rms_norm") {
    const std::vector<float> weight = bundle.vector();
    const Tensor x = input(0);
    require(x.row_size() == static_cast<int64_t>(weight.size()), bundle, "rms_norm");
    return nn::rms_norm(x, weight, bundle.get<float>("eps"), runtime);
  }
  if (op == "silu_mul") {
    Tensor gate = input(0);
    const Tensor up = input(1);
    require(gate.shape() == up.shape(), bundle, "silu_mul");
    return nn::swiglu(std::move(gate), up, runtime);
  }
  if (op == "add") {
    Tensor x = input(0);
    const Tensor y = input(1);
    require(x.size() == y.size() && x.shape()[0] == y.shape()[0], bundle, "add");
    nn::add(x, y, runtime);
    return x;
  }
  if (op == "router") {
    const Tensor logits = input(0);
    const auto chosen = bundle.get<int64_t>("chosen");
    require(chosen >= 1 && chosen <= logits.row_size(), bundle, "router");
    return nn::route(logits, chosen);
  }
  if (op == "embedding") {
    const StoredTensor weight = bundle.weight();
    const auto ids = bundle.get<std::vector<int32_t>>("ids");
    require(weight.shape.rank() == 2 && !ids.empty() &&
                std::ranges::all_of(ids, [&](int32_t id) { return id >= 0 && id < weight.rows(); }),
            bundle, "embedding");
    nn::Linear table{};
    table.runtime = &runtime;
    table.weight = quant::pack_tensors({&weight, 1}, *runtime.pool);
    return nn::embedding(ids, table);
  }
  fail(ErrorCode::format, "[{}] op: expected an operation of lockstep, got {}", bundle.where(), op);
}

}  // namespace

void write_bundle(const fs::path& path, const fs::path& model, const Trace& reference, const SiteScore& site,
                  const std::string& policy) {
  const Checkpoint checkpoint = Checkpoint::open(model);
  const ModelFacts about(checkpoint);
  const auto how = recipe(site.site, about.experts > 0);
  if (!how) {
    fail(ErrorCode::invalid_argument,
         "[bundle] site: expected an operation with few inputs, got {}; bundle its neighbours instead",
         site.name());
  }
  File file;
  json facts = {{"version", kVersion},
                {"op", how->op},
                {"site", site.site},
                {"name", site.name()},
                {"layer", site.layer},
                {"step", site.step},
                {"row", site.row},
                {"inputs", json::array()},
                {"floor", site.floor},
                {"policy", policy},
                {"reference", reference.engine},
                {"config", about.config},
                {"theta", about.rope_theta},
                {"chosen", about.experts_per_token},
                {"window", site.layer < 0 ? 0 : about.windows.at(static_cast<size_t>(site.layer))},
                {"scale", 1.0 / std::sqrt(static_cast<double>(about.head_dim))},
                {"eps", about.eps}};
  const Gathered expected = gather(reference, site.layer, site.site, site.row, site.step, false);
  file.add("expected", expected);
  facts["positions"] = expected.positions;
  const Trace::Sequence& sequence = reference.sequences.at(static_cast<size_t>(site.row));
  std::vector<int32_t> ids = sequence.ids;
  ids.insert(ids.end(), sequence.fed.begin(), sequence.fed.end());
  facts["context"] = ids.size();
  for (const int32_t position : expected.positions)
    facts["ids"].push_back(ids.at(static_cast<size_t>(position)));
  for (const std::string& input : how->inputs) {
    const auto [layer, name] = site_of(input, site.layer, reference.layers);
    file.add("input." + input,
             gather(reference, layer, name, site.row, site.step, how->every_step && input != "q_rope"));
    facts["inputs"].push_back(input);
  }
  const std::string prefix = "model.layers." + std::to_string(site.layer) + ".";
  Gathered bias;
  for (const std::string& name : how->weights) {
    const StoredTensor* weight = checkpoint.find(name);
    if (weight == nullptr) weight = checkpoint.find(prefix + name);
    if (weight == nullptr) continue;
    facts["weight"] = add_weight(file, *weight);
    const std::string bias_name = weight->name.substr(0, weight->name.rfind('.')) + ".bias";
    if (const StoredTensor* stored = checkpoint.find(bias_name); stored != nullptr && how->op == "linear") {
      std::vector<float> values(static_cast<size_t>(stored->columns()));
      quant::dequantise_row(*stored, 0, values.data());
      for (int64_t i = 0; i < stored->columns(); ++i)
        bias.values.push_back(values[static_cast<size_t>(stored->stored_row(i))]);
      bias.shape = {stored->columns()};
      file.add("bias", bias);
    }
    break;
  }
  save_tensors(path, file.tensors, {{kKey, facts.dump()}});
}

DiffReport replay_bundle(const fs::path& path, const ModelOptions& options) {
  const Reader bundle(path);
  const auto policy = bundle.get<std::string>("policy");
  Pool pool(options.threads);
  nn::Runtime runtime;
  runtime.kernels = &kernels::select(options.isa);
  runtime.pool = &pool;
  const std::string precision = policy.substr(0, policy.find('/'));
  runtime.precision = parse_precision(precision);
  const KvType kv_type = parse_kv_type(policy.substr(std::min(policy.size(), precision.size() + 1)));
  const Tensor expected = bundle.tensor("expected");
  const Tensor got = run_operation(bundle, runtime, kv_type);
  require(got.size() == expected.size(), bundle, "expected");
  const auto trace = [&](const Tensor& values, std::string engine) {
    Trace one;
    one.engine = std::move(engine);
    one.where = bundle.where();
    TraceEvent event;
    event.step = bundle.get<int>("step");
    event.row = bundle.get<int>("row");
    event.layer = bundle.get<int>("layer");
    event.site = bundle.get<std::string>("site");
    event.first_position = bundle.get<std::vector<int32_t>>("positions").at(0);
    event.shape = expected.shape();
    if (const auto site = find_site(event.site)) event.axes = axes_of(*site);
    one.add(std::move(event), values.values());
    return one;
  };
  const Trace ours = trace(got, "lockstep " + std::string(runtime.kernels->isa) + ", on the bundle's inputs");
  const Trace theirs = trace(expected, bundle.get<std::string>("reference"));
  const auto mine = join(ours), known = join(theirs);
  DiffReport report;
  report.subject = ours.engine;
  report.reference = theirs.engine;
  const Floor floor(bundle.get<std::string>("name"), bundle.get<double>("floor"));
  Comparison comparison(floor, report);
  report.expected = report.compared = 1;
  report.scores.push_back(comparison.score(mine.begin()->second, known.begin()->second));
  conclude(report);
  if (report.first) {
    report.grid = comparison.grid(mine.begin()->second, known.begin()->second);
    report.hints = hints(*report.first, mine.begin()->second, known.begin()->second);
  }
  return report;
}

}  // namespace lockstep

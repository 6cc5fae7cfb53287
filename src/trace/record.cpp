// Running our engine with every site recorded, a fault injected if asked for.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "format/sha256.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/inject.h"
#include "trace/passes.h"
#include "trace/ties.h"
#include "trace/writer.h"

namespace lockstep {

namespace {

class Recorder : public Observer {
 public:
  using Sink = std::function<void(TraceEvent&&, std::span<const float>)>;

  Recorder(Sink sink, const TraceOptions& options, const PassRows& rows, const ModelFacts& facts,
           const Injection* injection)
      : sink_(std::move(sink)), options_(options), rows_(rows), facts_(facts), injection_(injection) {
    if (options.ties) ties_.emplace(*options.ties);
  }

  std::vector<Trace::Tie> ties() { return ties_ ? ties_->take() : std::vector<Trace::Tie>(); }

  Interest inner(Site site) const override {
    if (injection_ != nullptr && injection_->inner == site) return Interest::change;
    return in_level(site, options_.level) ? Interest::read : Interest::none;
  }

  void observe(int layer, Site site, Tensor& tensor) override {
    const auto look = [&] {
      if (ties_ && site == Site::router_weights) ties_->settle(rows_, layer, router_logits_, tensor);
      if (in_level(site, options_.level) && in_layers(layer)) record(layer, site, tensor);
    };
    if (injection_ != nullptr)
      injection_->around(facts_, rows_, layer, site, tensor, seen_, look);
    else
      look();
    if (ties_ && site == Site::router_logits) router_logits_ = tensor.clone();
  }

 private:
  bool in_layers(int layer) const {
    return !options_.layers || (layer >= options_.layers->first && layer <= options_.layers->second);
  }

  // One event a sequence: rows of one sequence lie side by side.
  void record(int layer, Site site, const Tensor& tensor) {
    const int64_t rows = tensor.shape()[0];
    for (int64_t begin = 0; begin < rows;) {
      int64_t end = begin;
      while (end < rows &&
             rows_.sequences[static_cast<size_t>(end)] == rows_.sequences[static_cast<size_t>(begin)])
        ++end;
      TraceEvent event;
      event.step = rows_.step;
      event.chunk = rows_.chunk;
      event.row = rows_.sequences[static_cast<size_t>(begin)];
      event.layer = layer;
      event.site = std::string(site_name(site));
      event.first_position = rows_.positions[static_cast<size_t>(begin)];
      event.shape = tensor.shape();
      event.shape[0] = end - begin;
      event.axes = axes_of(site);
      const auto width = static_cast<size_t>(tensor.row_size());
      const auto values = tensor.values().subspan(static_cast<size_t>(begin) * width,
                                                  static_cast<size_t>(end - begin) * width);
      if (event.axes == "T H K") {
        const std::vector<float> own =
            own_keys(event, values, rows_.positions[static_cast<size_t>(end - 1)] + 1);
        sink_(std::move(event), own);
      } else {
        sink_(std::move(event), values);
      }
      begin = end;
    }
  }

  // Rows over the keys of the longest sequence, cut to those of the sequence itself.
  static std::vector<float> own_keys(TraceEvent& event, std::span<const float> values, int64_t keys) {
    const int64_t all = event.shape[2];
    event.shape[2] = keys;
    std::vector<float> own;
    for (size_t row = 0; row < values.size(); row += static_cast<size_t>(all)) {
      own.insert(own.end(), values.begin() + static_cast<int64_t>(row),
                 values.begin() + static_cast<int64_t>(row) + keys);
    }
    return own;
  }

  Sink sink_;
  const TraceOptions& options_;
  const PassRows& rows_;
  const ModelFacts& facts_;
  const Injection* injection_;
  std::map<Site, Tensor> seen_;
  std::optional<TieBreaker> ties_;
  Tensor router_logits_;  // [T, E] of the layer that is computed
};

}  // namespace

std::map<std::string, std::string> weight_sums(const Checkpoint& checkpoint) {
  std::map<std::string, std::string> sums;
  for (const std::filesystem::path& file : checkpoint.weight_files())
    sums[file.filename().string()] = sha256_of(file);
  return sums;
}

namespace {

// Runs the model, handing every event to `sink`, and returns what is known besides.
Trace record(const std::filesystem::path& path, const TraceOptions& options, Recorder::Sink sink) {
  if (options.sequences.empty())
    fail(ErrorCode::invalid_argument, "[trace] sequences: expected at least one, got none");
  if (options.level < 0 || options.level > 3) {
    fail(ErrorCode::invalid_argument, "[trace] level: expected 0 to 3, got {}", options.level);
  }
  const Checkpoint checkpoint = Checkpoint::open(path);
  const ModelFacts facts(checkpoint);
  std::optional<Injection> chosen;
  if (!options.fault.empty()) chosen = find_injection(options.fault, facts);
  const Injection* injection = chosen ? &*chosen : nullptr;
  ModelOptions model_options = options.model;
  if (injection != nullptr && injection->patch) model_options.config_patch = injection->patch(facts).dump();
  const auto model = Model::load(path, model_options);
  if (options.layers && options.layers->second >= model->info().layers) {
    fail(ErrorCode::invalid_argument, "[trace] layers: expected some of 0 to {}, got {} to {}",
         model->info().layers - 1, options.layers->first, options.layers->second);
  }
  Trace trace;
  trace.engine = "lockstep " + std::string(model->isa());
  trace.architecture = model->info().architecture;
  trace.precision = std::string(precision_name(model->precision()));
  trace.kv_type = std::string(kv_type_name(options.kv_type));
  trace.layers = model->info().layers;
  trace.level = options.level;
  trace.where = "lockstep";
  trace.config = checkpoint.config().json();
  trace.unread_keys = model->info().unread_keys;
  if (options.checksums) trace.weights_sha256 = weight_sums(checkpoint);
  std::set<std::string> sites;
  const auto counting = [&](TraceEvent&& event, std::span<const float> values) {
    sites.insert(event.site);
    sink(std::move(event), values);
  };
  PassRows rows;
  Recorder recorder(counting, options, rows, facts, injection);
  trace.sequences = run_passes(model, options, rows, recorder);
  trace.ties = recorder.ties();
  trace.sites.assign(sites.begin(), sites.end());
  return trace;
}

}  // namespace

Trace record_trace(const std::filesystem::path& path, const TraceOptions& options) {
  Trace kept;
  Trace facts = record(path, options, [&](TraceEvent&& event, std::span<const float> values) {
    kept.add(std::move(event), values);
  });
  facts.take_events(std::move(kept));
  return facts;
}

int64_t record_trace_to(const std::filesystem::path& directory, const std::filesystem::path& path,
                        const TraceOptions& options) {
  TraceWriter writer(directory, std::string(precision_name(options.model.precision)), options.storage);
  const Trace facts = record(path, options, [&](TraceEvent&& event, std::span<const float> values) {
    event.values = values;
    event.hash = trace_hash(values);
    writer.add(event);
  });
  if (writer.events() == 0)
    fail(ErrorCode::invalid_argument,
         "[trace] sites: expected some, got none: no site of this level lies in these layers");
  writer.finish(facts);
  return writer.events();
}

struct FaultObserver::State {
  explicit State(const std::string& fault, const std::filesystem::path& path)
      : checkpoint(Checkpoint::open(path)), facts(checkpoint), injection(find_injection(fault, facts)) {
    if (injection.patch) patch = injection.patch(facts).dump();
  }
  Checkpoint checkpoint;
  ModelFacts facts;
  Injection injection;
  std::string patch;
  PassRows rows;
  int64_t next_position = 0;
  std::map<Site, Tensor> seen;
};

FaultObserver::FaultObserver(const std::string& fault, const std::filesystem::path& model)
    : state_(std::make_unique<State>(fault, model)) {}
FaultObserver::~FaultObserver() = default;
const std::string& FaultObserver::config_patch() const { return state_->patch; }

Interest FaultObserver::inner(Site site) const {
  return state_->injection.inner == site ? Interest::change : Interest::none;
}

void FaultObserver::observe(int layer, Site site, Tensor& tensor) {
  State& s = *state_;
  if (site == Site::embed) {
    // A session's passes follow one another: the first are the prompt's, single rows after them decode.
    s.rows.step = s.next_position > 0 && tensor.shape()[0] == 1 ? s.rows.step + 1 : 0;
    s.rows.positions.clear();
    for (int64_t t = 0; t < tensor.shape()[0]; ++t)
      s.rows.positions.push_back(static_cast<int32_t>(s.next_position++));
    s.rows.sequences.assign(s.rows.positions.size(), 0);
  }
  s.injection.around(s.facts, s.rows, layer, site, tensor, s.seen, [] {});
}

std::optional<std::string> cannot_act(const Fault& fault, const std::filesystem::path& path,
                                      const TraceOptions& options) {
  const Checkpoint checkpoint = Checkpoint::open(path);
  std::vector<Trace::Sequence> sequences = options.sequences;
  for (Trace::Sequence& each : sequences) {
    if (each.fed.empty()) each.fed.resize(static_cast<size_t>(options.steps));
  }
  return find_injection(fault.name).cannot(ModelFacts(checkpoint), sequences);
}

void require_acting(const std::string& fault, const std::filesystem::path& path,
                    const TraceOptions& options) {
  if (fault.empty()) return;
  find_injection(fault, ModelFacts(Checkpoint::open(path)));
  if (const auto why = cannot_act(find_fault(fault), path, options))
    fail(ErrorCode::invalid_argument, "[inject] fault: expected one that can act here, got {}: {}", fault,
         *why);
}

}  // namespace lockstep

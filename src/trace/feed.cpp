// Our operations fed with a reference's tensors.
#include "trace/feed.h"

#include <fmt/format.h>

#include <algorithm>

#include "trace/passes.h"

namespace lockstep {
namespace {

// Records what our operation makes of the reference's tensors, and then puts the reference's in its place.
class Replayer : public Observer {
 public:
  Replayer(const Trace& reference, const PassRows& rows, const ModelFacts& facts, const Injection* injection,
           Trace& ours, MissingSites* missing)
      : rows_(rows),
        facts_(facts),
        injection_(injection),
        ours_(ours),
        level_(reference.level),
        missing_(missing) {
    for (const TraceEvent& event : reference.events()) {
      for (int64_t t = 0; t < event.shape[0]; ++t) {
        const auto width = event.values.size() / static_cast<size_t>(event.shape[0]);
        known_[{event.step, event.row, event.layer, event.site, event.first_position + t}] =
            event.values.subspan(static_cast<size_t>(t) * width, width);
      }
      sites_.insert(event.site);
      passes_.insert({event.step, event.row, event.layer, event.site});
    }
  }

  Interest inner(Site site) const override {
    const bool injected = injection_ != nullptr && injection_->inner == site;
    if (injected || sites_.contains(std::string(site_name(site)))) return Interest::change;
    return missing_ != nullptr && in_level(site, level_) ? Interest::read : Interest::none;
  }

  void observe(int layer, Site site, Tensor& tensor) override {
    if (injection_ == nullptr) return exchange(layer, site, tensor);
    injection_->around(facts_, rows_, layer, site, tensor, seen_, [&] { exchange(layer, site, tensor); });
  }

 private:
  void exchange(int layer, Site site, Tensor& tensor) {
    const std::string name(site_name(site));
    const std::string axes = axes_of(site);
    for (int64_t t = 0; t < tensor.shape()[0]; ++t) {
      const int row = rows_.sequences[static_cast<size_t>(t)];
      const int64_t position = rows_.positions[static_cast<size_t>(t)];
      const auto known = known_.find({rows_.step, row, layer, name, position});
      if (known == known_.end()) {
        note_missing(layer, site, row);
        continue;
      }
      TraceEvent event;
      event.step = rows_.step;
      event.row = row;
      event.layer = layer;
      event.site = name;
      event.first_position = position;
      event.shape = tensor.shape();
      event.shape[0] = 1;
      event.axes = axes;
      // Rows over keys are as long as those of the longest sequence; the reference's end with its own.
      const int64_t all = tensor.shape()[tensor.shape().rank() - 1];
      const int64_t parts = tensor.row_size() / all;
      const auto kept = static_cast<int64_t>(known->second.size()) / parts;
      if (kept > all || (kept < all && axes != "T H K") ||
          kept * parts != static_cast<int64_t>(known->second.size()))
        continue;
      event.shape[event.shape.rank() - 1] = kept;
      std::vector<float> mine;
      for (int64_t p = 0; p < parts; ++p) {
        float* from = tensor.row(t) + p * all;
        mine.insert(mine.end(), from, from + kept);
        std::copy_n(known->second.begin() + p * kept, kept, from);
      }
      ours_.add(std::move(event), mine);
    }
  }

  void note_missing(int layer, Site site, int row) {
    TraceEvent event;
    event.layer = layer;
    event.site = std::string(site_name(site));
    if (missing_ == nullptr || !in_level(site, level_) ||
        passes_.contains({rows_.step, row, layer, event.site}))
      return;
    missing_->emplace(fmt::format("step {}, sequence {}", rows_.step, row), event.name());
  }

  const PassRows& rows_;
  const ModelFacts& facts_;
  const Injection* injection_;
  Trace& ours_;
  int level_;
  MissingSites* missing_;
  std::set<std::tuple<int, int, int, std::string>> passes_;  // step, sequence, layer, site
  std::map<std::tuple<int, int, int, std::string, int64_t>, std::span<const float>> known_;
  std::set<std::string> sites_;
  std::map<Site, Tensor> seen_;
};

}  // namespace

Feeder::Feeder(const std::filesystem::path& path, const TraceOptions& options)
    : options_(options), checkpoint_(Checkpoint::open(path)), facts_(checkpoint_) {
  if (!options.fault.empty()) injection_ = find_injection(options.fault, facts_);
  if (injection_ && injection_->patch) options_.model.config_patch = injection_->patch(facts_).dump();
  model_ = Model::load(path, options_.model);
}

Trace Feeder::run(const Trace& fed, MissingSites* missing) const {
  TraceOptions options = options_;
  options.sequences = fed.sequences;
  Trace ours;
  ours.engine = "lockstep " + std::string(model_->isa()) + ", on the reference's inputs";
  PassRows rows;
  Replayer replayer(fed, rows, facts_, injection_ ? &*injection_ : nullptr, ours, missing);
  ours.sequences = run_passes(model_, options, rows, replayer);
  return ours;
}

}  // namespace lockstep

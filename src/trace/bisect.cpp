// From layer boundaries to the one layer that is wrong, and into it.
#include <set>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"
#include "trace/feed.h"

namespace lockstep {
namespace {

template <typename Wanted>
Trace only(const Trace& whole, Wanted wanted) {
  Trace part = whole;
  part.drop_events();
  for (const TraceEvent& event : whole.events()) {
    if (wanted(event)) part.add(event, event.values);
  }
  return part;
}

// The last layer that has to be repaired before the logits are right: found by halving, as a layer that is
// right stays right when the reference's residual enters it. Nothing: even the last layer's output does not
// repair them.
std::optional<int> last_faulty(const Feeder& feeder, const Trace& reference, const Floor& floor, int first,
                               int layers, int& runs) {
  const auto repairs = [&](int layer) {
    const Trace graft = only(reference, [&](const TraceEvent& event) {
      return (event.layer == layer && event.site == "ffn_resid") || event.site == "logits";
    });
    ++runs;
    const Trace ours = feeder.run(graft);
    const auto logits = [](const TraceEvent& event) { return event.site == "logits"; };
    return diff(only(ours, logits), only(reference, logits), floor).verdict == Verdict::within;
  };
  int low = first, high = layers;  // the answer is in [low, high]; high == layers: there is none
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (repairs(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low == layers ? std::nullopt : std::optional(low);
}

}  // namespace

DiffReport bisect(const std::filesystem::path& path, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, bool graft) {
  if (graft && reference.storage.kind != TraceStorage::Kind::full)
    fail(ErrorCode::invalid_argument,
         "[{}] bisect: expected a trace of whole tensors to graft, got a reduced one", reference.where);
  TraceOptions coarse = options;
  coarse.sequences = reference.sequences;
  coarse.level = 1;
  coarse.checksums = true;
  const Trace ours = record_trace(path, coarse);
  const std::set<std::string> between(ours.sites.begin(), ours.sites.end());
  DiffReport report = diff(
      ours, only(reference, [&](const TraceEvent& event) { return between.contains(event.site); }), floor);
  const std::string all = fmt::format("{} of {} sites compared first: those between layers", report.compared,
                                      join(reference).size());
  if (report.verdict != Verdict::divergent || report.first->layer == kNoLayer) {
    report.notes.push_back(all);
    return report;
  }
  const int layer = report.first->layer;
  TraceOptions fine = coarse;
  fine.checksums = false;
  fine.level = std::max(reference.level, 1);
  fine.layers = {layer, layer};
  const Trace window = only(reference, [&](const TraceEvent& event) { return event.layer == layer; });
  report = diff(record_trace(path, fine), window, floor);
  report.notes.push_back(all);
  report.notes.push_back(fmt::format("then all of layer {}, where they part first", layer));
  if (!graft) return report;
  int runs = 0;
  const std::optional<int> last =
      last_faulty(Feeder(path, options), reference, floor, layer, static_cast<int>(reference.layers), runs);
  const std::string done = fmt::format("{} runs with the reference's residuals grafted into ours: ", runs);
  report.notes.push_back(
      done + (!last ? "no layer's repairs the logits: after the layers something is wrong too"
              : *last == layer
                  ? fmt::format("layer {} is the only one that is wrong", layer)
                  : fmt::format("several faults: layer {} is the last that is wrong; lockstep replay "
                                "lists every operation",
                                *last)));
  return report;
}

}  // namespace lockstep

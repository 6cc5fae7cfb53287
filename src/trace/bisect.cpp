// From layer boundaries to the one layer that is wrong, and into it.
#include <set>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"
#include "trace/feed.h"

namespace lockstep {
namespace {

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

// Layers in runs whose tensors, as fine as the reference has them, are of no more than this many bytes.
std::vector<std::pair<int, int>> windows(const Trace& reference, int last) {
  constexpr size_t kMostBytes = size_t{256} << 20;
  std::vector<size_t> bytes(static_cast<size_t>(last) + 1);
  for (const TraceEvent& event : reference.events()) {
    if (event.layer >= 0 && event.layer <= last)
      bytes[static_cast<size_t>(event.layer)] += event.values.size_bytes();
  }
  std::vector<std::pair<int, int>> all;
  size_t sum = 0;
  for (int layer = 0; layer <= last; ++layer) {
    sum += bytes[static_cast<size_t>(layer)];
    if (all.empty() || sum > kMostBytes) {
      all.emplace_back(layer, layer);
      sum = bytes[static_cast<size_t>(layer)];
    }
    all.back().second = layer;
  }
  return all;
}

// Every site of the layers up to one, where a difference may be that a residual sum has drowned. The report
// of the window that holds the first; nothing: none does.
std::optional<DiffReport> look_closer(const std::filesystem::path& path, const TraceOptions& options,
                                      const Trace& reference, const Floor& floor, int last) {
  std::optional<DiffReport> found;
  TraceOptions fine = options;
  fine.checksums = false;
  fine.level = std::max(reference.level, 1);
  const auto place = [](const DiffReport& report) {
    return place_of(report.first->step, report.first->layer, report.first->site, report.first->row);
  };
  for (const std::pair<int, int>& window : windows(reference, last)) {
    fine.layers = window;
    DiffReport report = diff(record_trace(path, fine),
                             only(reference,
                                  [&](const TraceEvent& event) {
                                    return event.layer >= window.first && event.layer <= window.second;
                                  }),
                             floor);
    if (report.first && (!found || place(report) < place(*found))) found = std::move(report);
  }
  return found;
}

}  // namespace

DiffReport bisect(const std::filesystem::path& path, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, bool graft) {
  if (graft && reference.storage.kind != TraceStorage::Kind::full)
    fail(ErrorCode::invalid_argument,
         "[{}] bisect: expected a trace of whole tensors to graft, got a reduced one", reference.where);
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.reference = reference.engine;
  report.reason = unusable(path, options, reference, floor);
  if (!report.reason.empty()) return report;
  TraceOptions coarse = options;
  coarse.sequences = reference.sequences;
  coarse.level = 1;
  coarse.ties = {&reference, &floor};
  coarse.checksums = true;
  const Trace ours = record_trace(path, coarse);
  const std::set<std::string> between(ours.sites.begin(), ours.sites.end());
  report = diff(ours, only(reference, [&](const TraceEvent& event) { return between.contains(event.site); }),
                floor);
  const std::string all = fmt::format("{} of {} sites compared first: those between layers", report.compared,
                                      join(reference).size());
  if (report.verdict == Verdict::within) report.reason += ", between layers";
  if (!report.first || report.first->site == "embed") {
    report.notes.push_back(all);
    return report;
  }
  // What shows after the layers may have begun in any.
  const int layer =
      report.first->layer == kNoLayer ? static_cast<int>(reference.layers) - 1 : report.first->layer;
  if (auto closer = look_closer(path, coarse, reference, floor, layer)) report = std::move(*closer);
  report.notes.push_back(all);
  report.notes.push_back(fmt::format(
      "then all of layers 0 to {}: a small error can drown in the residual before it shows", layer));
  if (!graft || report.verdict != Verdict::divergent || report.first->layer == kNoLayer) return report;
  int runs = 0;
  const int first = report.first->layer;
  const std::optional<int> last =
      last_faulty(Feeder(path, options), reference, floor, first, static_cast<int>(reference.layers), runs);
  const std::string done =
      fmt::format("{} run{} with the reference's residuals grafted into ours: ", runs, runs == 1 ? "" : "s");
  report.notes.push_back(
      done + (!last ? "no layer's repairs the logits: after the layers something is wrong too"
              : *last == first
                  ? fmt::format("layer {} is the only one that is wrong", first)
                  : fmt::format("several faults: layer {} is the last that is wrong; lockstep replay "
                                "lists every operation",
                                *last)));
  return report;
}

}  // namespace lockstep

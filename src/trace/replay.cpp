// Our operations compared one by one: errors made apart from errors inherited.

#include <utility>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"
#include "trace/feed.h"

namespace lockstep {
namespace {

// A tensor that is wrong itself neither follows from what is before it, nor does what is after follow from
// it; but that does follow from what we make in its place. Where it does not, both operations are wrong.
void blame_the_tensor(const Feeder& feeder, const Trace& reference, const Floor& floor, DiffReport& report) {
  const SiteScore* next = differing_successor(report);
  if (next == nullptr) return;
  const SiteScore& first = *report.first;
  const Trace ours = feeder.run(only(reference, [&](const TraceEvent& event) {
    return event.layer != first.layer || event.site != first.site;
  }));
  const auto mine = join(ours), theirs = join(reference);
  const Place place = place_of(next->step, next->layer, next->site, next->row);
  const auto made = mine.find(place);
  DiffReport again;
  if (made == mine.end() || Comparison(floor, again).score(made->second, theirs.at(place)).score > kBand)
    return;
  report.verdict = Verdict::inconclusive;
  report.reason = fmt::format(
      "{} of step {} does not follow from what the reference holds before it, and its {} follows from ours: "
      "the capture is wrong there",
      first.name(), first.step, next->name());
}

}  // namespace

DiffReport replay(const std::filesystem::path& path, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, const std::string& site) {
  if (reference.storage.kind != TraceStorage::Kind::full)
    fail(ErrorCode::invalid_argument, "[{}] replay: expected a trace of whole tensors, got a reduced one",
         reference.where);
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.reference = reference.engine;
  report.reason = unusable(path, options, reference, floor);
  if (!report.reason.empty()) return report;
  MissingSites missing;
  const Feeder feeder(path, options);
  const Trace ours = feeder.run(reference, &missing);
  report.subject = ours.engine;
  const auto mine = join(ours);
  const auto theirs = join(reference);
  Comparison comparison(floor, report);
  for (const auto& [place, joined] : theirs) {
    const TraceEvent& event = *joined.event;
    if (!site.empty() && event.name() != site) continue;
    ++report.expected;
    const auto found = mine.find(place);
    std::string problem = found == mine.end() || !same_rows(found->second, joined)
                              ? "not computed here"
                              : comparison.unjudged(event);
    if (!problem.empty()) {
      report.unmatched.push_back({fmt::format("step {}", event.step), event.name(), problem});
      continue;
    }
    ++report.compared;
    report.scores.push_back(comparison.score(found->second, joined));
  }
  if (report.expected == 0)
    fail(ErrorCode::invalid_argument, "[replay] site: expected one of the trace, such as L00.q_rope; got {}",
         site);
  for (const auto& [phase, name] : missing) {
    if (site.empty() || name == site) report.unmatched.push_back({phase, name, "not in the reference"});
  }
  conclude(report);
  report.alone = std::exchange(report.inherited, 0);
  if (report.first) {
    const Place place =
        place_of(report.first->step, report.first->layer, report.first->site, report.first->row);
    report.grid = comparison.grid(mine.at(place), theirs.at(place));
    report.hints = hints(*report.first, mine.at(place), theirs.at(place));
    if (report.first->site == "logits")
      report.notes.emplace_back(
          "nothing is computed from the logits: whether they or the product are wrong, a second reference "
          "tells");
    blame_the_tensor(feeder, reference, floor, report);
  }
  report.notes.emplace_back("errors are those of each operation alone, on the reference's inputs");
  return report;
}

}  // namespace lockstep

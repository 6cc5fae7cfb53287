// Our operations compared one by one: errors made apart from errors inherited.
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"
#include "trace/feed.h"

namespace lockstep {

DiffReport replay(const std::filesystem::path& path, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, const std::string& site) {
  if (reference.storage.kind != TraceStorage::Kind::full)
    fail(ErrorCode::invalid_argument, "[{}] replay: expected a trace of whole tensors, got a reduced one",
         reference.where);
  const Trace ours = Feeder(path, options).run(reference);
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.subject = ours.engine;
  report.reference = reference.engine;
  report.reason = same_weights(weight_sums(Checkpoint::open(path)), reference);
  if (report.reason.empty()) report.reason = self_check(reference);
  if (!report.reason.empty()) return report;
  const auto mine = join(ours);
  const auto theirs = join(reference);
  Comparison comparison(floor, report);
  for (const auto& [place, joined] : theirs) {
    if (!site.empty() && joined.event->name() != site) continue;
    ++report.expected;
    const auto found = mine.find(place);
    if (found == mine.end() || !same_rows(found->second, joined)) {
      report.unmatched.push_back(
          fmt::format("step {}, {}: not computed here", std::get<0>(place), joined.event->name()));
      continue;
    }
    ++report.compared;
    report.scores.push_back(comparison.score(found->second, joined));
  }
  if (report.expected == 0)
    fail(ErrorCode::invalid_argument, "[replay] site: expected one of the trace, such as L00.q_rope; got {}",
         site);
  conclude(report);
  if (report.first) {
    const Place place =
        place_of(report.first->step, report.first->layer, report.first->site, report.first->row);
    report.grid = comparison.grid(mine.at(place), theirs.at(place));
    report.hints = hints(*report.first, mine.at(place), theirs.at(place));
  }
  report.notes.emplace_back("errors are those of each operation alone, on the reference's inputs");
  return report;
}

}  // namespace lockstep

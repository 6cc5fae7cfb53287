// Two traces compared in causal order.
#include <algorithm>
#include <cmath>
#include <set>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"

namespace lockstep {
namespace {

using Sites = std::map<Place, Joined>;

// A difference that its successors have not inherited is none of computation: the recorded tensors do not fit
// what was computed from them.
void check_inheritance(const Sites& ours, const Sites& theirs, const Floor& floor, DiffReport& report) {
  constexpr double kCoarse = 1e-2;  // some floor of 8 bits or bf16 is larger, none of f32 or 16 bits
  if (!report.first) return;
  if (report.first->site == "logits") {
    report.notes.emplace_back(
        "nothing before it differs, and nothing is computed from it: lockstep replay tells whether the "
        "logits "
        "follow from what the reference holds before them");
    return;
  }
  if (report.first->of_choice) return;  // set aside: what follows is computed with the reference's
  const Inheritance inherited = inheritance(report, floor, ours, theirs);
  const bool coarse =
      std::ranges::any_of(report.scores, [](const SiteScore& each) { return each.floor > kCoarse; });
  if (inherited == Inheritance::unknown && coarse) {
    report.verdict = Verdict::inconclusive;
    report.reason = fmt::format(
        "{} of step {} differs, yet too little beside the rounding of {} to be followed into what is "
        "computed from it: it may be either capture's; compare in f32, or let lockstep replay tell",
        report.first->name(), report.first->step, floor.policy());
  }
  if (inherited != Inheritance::missing) return;
  report.verdict = Verdict::inconclusive;
  report.reason = fmt::format(
      "{} of step {} differs, yet what is computed from it does not: one of the captures is wrong there",
      report.first->name(), report.first->step);
}

// Rounding that another policy declares is no fault: of those whose floor holds the first error, the one that
// holds every site, and whose floor is nearest to it.
void note_policies(const Floor& floor, DiffReport& report) {
  if (!report.first || report.first->of_choice) return;
  const auto ratio = [](const Floor& other, const SiteScore& site) {
    return site.error / other.at(site.step > 0, site.name(), site.width);
  };
  std::optional<std::tuple<bool, double, std::string>> best;  // some site is not held, distance, text
  for (const Floor& other : floor.others()) {
    const double here = ratio(other, *report.first);
    if (here > kBand) continue;
    const bool all = std::ranges::all_of(report.scores,
                                         [&](const SiteScore& each) { return ratio(other, each) <= kBand; });
    std::tuple candidate(!all, std::abs(std::log(here)),
                         fmt::format("rounding as in {} ({}): {:.2g} x that floor here, and {}",
                                     other.policy(), policy_summary(other.policy()), here,
                                     all ? "every site is within it" : "not every later site is within it"));
    if (!best || candidate < *best) best = std::move(candidate);
  }
  if (best) report.hints.insert(report.hints.begin(), std::get<2>(*best));
}

// An error barely beyond the band may have begun in a site barely within it.
void note_suspects(DiffReport& report) {
  const SiteScore* worst = nullptr;
  for (const SiteScore& each : report.scores) {
    if (each.score > kBand) break;
    if (each.score > kBand / 2 && (worst == nullptr || each.score > worst->score)) worst = &each;
  }
  if (worst != nullptr)
    report.notes.push_back(fmt::format("it may have begun before: {} of step {} is at {:.3g} x its floor",
                                       worst->name(), worst->step, worst->score));
}

// Where the rounding that the policy declares begins to show, and its size.
void size_declared_rounding(const Floor& floor, DiffReport& report) {
  const std::vector<Floor> others = floor.others();
  const auto plain = std::ranges::find(others, "f32/f32", &Floor::policy);
  if (report.verdict != Verdict::within || plain == others.end()) return;
  const auto first = std::ranges::find_if(report.scores, [&](const SiteScore& each) {
    return each.error > kBand * plain->at(each.step > 0, each.name(), each.width);
  });
  if (first == report.scores.end()) return;
  const bool decode = first->step > 0;
  report.notes.push_back(fmt::format(
      "rounding declared as {} ({}) shows first in {}: error {:.3g} = {:.3g} x the floor of f32/f32, {:.2g} "
      "x its own",
      floor.policy(), policy_summary(floor.policy()), first->name(), first->error,
      first->error / plain->at(decode, first->name(), first->width),
      first->error / floor.at(decode, first->name(), first->width)));
}

// Why nothing should be compared; empty: it may.
std::string refusal(const Trace& subject, const Trace& reference, const Floor& floor) {
  for (const auto& problem : {same_inputs(subject, reference), floor.other_model(reference),
                              no_floor(floor, subject.precision + "/" + subject.kv_type)}) {
    if (!problem.empty()) return problem;
  }
  return self_check(reference);
}

// Why a site that both have cannot be compared; empty: it can.
std::string mismatch(const Joined& mine, const Joined& theirs) {
  if (!same_rows(mine, theirs))
    return fmt::format("rows of {} from position {} and of {} from position {}", mine.event->shape.str(),
                       mine.rows.begin()->first, theirs.event->shape.str(), theirs.rows.begin()->first);
  if (row_width(*mine.event) != row_width(*theirs.event) && mine.event->axes != "T H K")
    return fmt::format("rows of {} and of {} columns", row_width(*mine.event), row_width(*theirs.event));
  return {};
}

// Scores what both have, in causal order; returns the places of the reference that were not compared.
std::vector<Place> score_all(const Sites& ours, const Sites& theirs, std::span<const Trace::Tie> ties,
                             Comparison& comparison, DiffReport& report) {
  std::vector<Place> skipped;
  std::set<std::pair<bool, std::string>> judged, tied;  // in decode, name of a site
  for (const auto& [place, joined] : theirs) {
    ++report.expected;
    const auto mine = ours.find(place);
    const TraceEvent& event = *joined.event;
    std::string problem = mine == ours.end() ? "only in the reference" : mismatch(mine->second, joined);
    if (problem.empty() && event.site == "router_weights") {
      const auto logits = theirs.find(place_of(event.step, event.layer, "router_logits", event.row));
      const auto own = ours.find(place_of(event.step, event.layer, "router_logits", event.row));
      if (logits != theirs.end())
        comparison.leave_out_ties(mine->second, own == ours.end() ? nullptr : &own->second, joined,
                                  logits->second);
    }
    if (problem.empty()) problem = comparison.unjudged(event);
    if (problem.empty() && comparison.left_out(joined)) {
      tied.emplace(event.step > 0, event.name());
      --report.expected;
      continue;
    }
    if (!problem.empty()) {
      report.unmatched.push_back({fmt::format("step {}", event.step), event.name(), problem});
      skipped.push_back(place);
      continue;
    }
    ++report.compared;
    judged.emplace(event.step > 0, event.name());
    report.scores.push_back(comparison.score(mine->second, joined));
    if (event.site == "router_weights") {
      const auto logits = theirs.find(place_of(event.step, event.layer, "router_logits", event.row));
      if (logits != theirs.end()) comparison.judge_ties(ties, joined, logits->second, report.scores.back());
    }
    if (event.site == "logits") comparison.note_argmax(mine->second, joined);
  }
  for (const auto& site : tied) {
    if (judged.contains(site)) continue;
    ++report.expected;
    report.unmatched.push_back(
        {site.first ? "decode" : "prefill", site.second, "every row follows a tie of the router"});
  }
  for (const auto& [place, joined] : ours) {
    if (theirs.contains(place)) continue;
    const TraceEvent& event = *joined.event;
    report.unmatched.push_back({fmt::format("step {}", event.step), event.name(), "only in the subject"});
  }
  return skipped;
}

DiffReport compare(const Trace& subject, const Trace& reference, const Floor& floor) {
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.subject = subject.engine;
  report.reference = reference.engine;
  report.reason = refusal(subject, reference, floor);
  if (!report.reason.empty()) return report;
  const Sites ours = join(subject, reference.storage);
  const Sites theirs = join(reference, subject.storage);
  Comparison comparison(floor, report);
  const std::vector<Place> skipped = score_all(ours, theirs, subject.ties, comparison, report);
  conclude(report);
  if (report.first) {
    const SiteScore& first = *report.first;
    const Place place = place_of(first.step, first.layer, first.site, first.row);
    report.skipped = std::ranges::count_if(skipped, [&](const Place& each) { return each < place; });
    report.grid = comparison.grid(ours.at(place), theirs.at(place));
    report.hints = hints(first, ours.at(place), theirs.at(place));
    note_policies(floor, report);
    note_suspects(report);
  }
  if (floor.policy().empty())
    report.notes.emplace_back("no floor was measured: every site is judged by the rounding of a single sum");
  size_declared_rounding(floor, report);
  check_inheritance(ours, theirs, floor, report);
  return report;
}

// The error of the subject at one site, or nothing where it was not compared.
const SiteScore* score_at(const DiffReport& report, const SiteScore& site) {
  const auto found = std::ranges::find_if(report.scores, [&](const SiteScore& each) {
    return each.step == site.step && each.row == site.row && each.name() == site.name();
  });
  return found == report.scores.end() ? nullptr : &*found;
}

}  // namespace

std::string policy_summary(const std::string& policy) {
  const size_t slash = policy.find('/');
  const std::string precision = policy.substr(0, slash);
  const std::string kv = slash == std::string::npos ? "f32" : policy.substr(slash + 1);
  std::string text = precision == "q8"      ? "inputs of products rounded to 8 bits per block of 32"
                     : precision == "bf16"  ? "inputs of products rounded to 16-bit floats"
                     : precision == "fast"  ? "inputs of products in 8 bits, 16 bits or bf16, by role"
                     : precision == "exact" ? "inputs of products in 16-bit fixed point"
                                            : "f32 throughout";
  if (kv == "i16")
    text += ", attention in 16-bit fixed point";
  else if (kv != "f32")
    text += ", keys and values in " + kv;
  return text;
}

DiffReport diff(const Trace& subject, const Trace& reference, const Floor& floor) {
  return compare(subject, reference, floor);
}

DiffReport diff(const Trace& subject, const Trace& reference, const Trace& second, const Floor& floor) {
  DiffReport report = compare(subject, reference, floor);
  const DiffReport references = compare(reference, second, floor);
  if (!references.first) {
    if (references.compared == 0) {
      report.verdict = Verdict::inconclusive;
      report.reason = "the second reference cannot be compared: " + references.reason;
    } else {
      report.notes.push_back(
          fmt::format("{} agrees with the reference at {} sites", second.engine, references.compared));
    }
    return report;
  }
  const SiteScore& parting = *references.first;
  // What comes before the place where they part is not in dispute.
  const auto place = [](const SiteScore& site) {
    return place_of(site.step, site.layer, site.site, site.row);
  };
  if (report.verdict == Verdict::divergent && place(*report.first) < place(parting)) {
    report.notes.push_back(fmt::format("the references agree there, and part later: at {} of step {}",
                                       parting.name(), parting.step));
    return report;
  }
  const SiteScore* with_first = score_at(report, parting);
  const DiffReport other = compare(subject, second, floor);
  const SiteScore* with_second = score_at(other, parting);
  const auto agrees = [](const SiteScore* score) { return score != nullptr && score->score <= kBand; };
  const std::string side =
      agrees(with_first) && !agrees(with_second)
          ? fmt::format("the second ({}, {}) stands alone there", second.engine, second.where)
      : agrees(with_second) && !agrees(with_first)
          ? fmt::format("the first ({}, {}) stands alone there", reference.engine, reference.where)
          : "all three differ there";
  report.verdict = Verdict::inconclusive;
  report.reason = fmt::format("the references disagree with each other at {} of step {}, sequence {}: {}",
                              parting.name(), parting.step, parting.row, side);
  return report;
}

}  // namespace lockstep

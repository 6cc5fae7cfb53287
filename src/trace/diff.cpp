// Two traces compared in causal order.
#include <algorithm>
#include <cmath>
#include <set>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"

namespace lockstep {
namespace {

// A difference that the logits of its own pass have not inherited is none of computation: the recorded
// tensors do not fit their own successors.
void check_inheritance(DiffReport& report) {
  if (!report.first || report.first->site == "logits") return;
  const auto logits = std::ranges::find_if(report.scores, [&](const SiteScore& each) {
    return each.step == report.first->step && each.row == report.first->row && each.site == "logits";
  });
  if (logits == report.scores.end() || logits->score > kBand) return;
  report.verdict = Verdict::inconclusive;
  report.reason = fmt::format(
      "{} of step {} differs, yet the logits computed from it do not: one of the captures is wrong there",
      report.first->name(), report.first->step);
}

// Rounding that another policy declares is no fault: of those whose floor holds the first error, the one that
// holds every site, and whose floor is nearest to it.
void note_policies(const Floor& floor, DiffReport& report) {
  if (!report.first) return;
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

DiffReport compare(const Trace& subject, const Trace& reference, const Floor& floor) {
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.subject = subject.engine;
  report.reference = reference.engine;
  for (const std::string& problem : {same_inputs(subject, reference), self_check(reference)}) {
    report.reason = problem;
    if (!problem.empty()) return report;
  }
  const auto ours = join(subject, reference.storage);
  const auto theirs = join(reference, subject.storage);
  Comparison comparison(floor, report);
  const auto unmatched = [&](const Place& place, const Joined& joined, const std::string& why) {
    report.unmatched.push_back(fmt::format("step {}, {}: {}", std::get<0>(place), joined.event->name(), why));
  };
  for (const auto& [place, joined] : theirs) {
    ++report.expected;
    const auto mine = ours.find(place);
    if (mine == ours.end()) {
      unmatched(place, joined, "only in the reference");
      continue;
    }
    if (!same_rows(mine->second, joined)) {
      unmatched(place, joined,
                fmt::format("rows of {} from position {} and of {} from position {}",
                            mine->second.event->shape.str(), mine->second.rows.begin()->first,
                            joined.event->shape.str(), joined.rows.begin()->first));
      continue;
    }
    ++report.compared;
    if (joined.event->site == "router_weights") {
      const auto logits =
          theirs.find(place_of(joined.event->step, joined.event->layer, "router_logits", joined.event->row));
      if (logits != theirs.end()) comparison.leave_out_ties(mine->second, joined, logits->second);
    }
    report.scores.push_back(comparison.score(mine->second, joined));
    if (joined.event->site == "logits") comparison.note_argmax(mine->second, joined);
  }
  for (const auto& [place, joined] : ours) {
    if (!theirs.contains(place)) unmatched(place, joined, "only in the subject");
  }
  conclude(report);
  if (report.first) {
    const SiteScore& first = *report.first;
    const Place place = place_of(first.step, first.layer, first.site, first.row);
    report.grid = comparison.grid(ours.at(place), theirs.at(place));
    report.hints = hints(first, ours.at(place), theirs.at(place));
    note_policies(floor, report);
  }
  if (floor.policy().empty())
    report.notes.emplace_back("no floor was measured: every site is judged by the rounding of a single sum");
  size_declared_rounding(floor, report);
  check_inheritance(report);
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

std::string same_inputs(const Trace& subject, const Trace& reference) {
  if (subject.sequences.size() != reference.sequences.size()) {
    return fmt::format("expected {} sequences as in the reference, got {}", reference.sequences.size(),
                       subject.sequences.size());
  }
  for (size_t s = 0; s < subject.sequences.size(); ++s) {
    if (subject.sequences[s].ids != reference.sequences[s].ids) {
      const auto [mine, theirs] = std::ranges::mismatch(subject.sequences[s].ids, reference.sequences[s].ids);
      return fmt::format(
          "token ids of sequence {} differ from place {} on ({} and {} tokens): tokenizer, BOS or template",
          s, mine - subject.sequences[s].ids.begin(), subject.sequences[s].ids.size(),
          reference.sequences[s].ids.size());
    }
    if (subject.sequences[s].fed != reference.sequences[s].fed)
      return fmt::format("sequence {} was fed other tokens in decode; use --follow", s);
  }
  const auto reduced = [](const Trace& trace) { return trace.storage.kind != TraceStorage::Kind::full; };
  if (reduced(subject) && reduced(reference) && subject.storage != reference.storage)
    return "the traces keep other columns: record one with the other's --store and --seed";
  if (subject.layers > 0 && reference.layers > 0 && subject.layers != reference.layers)
    return fmt::format("the models differ: {} layers, and {} in the reference", subject.layers,
                       reference.layers);
  return same_weights(subject.weights_sha256, reference);
}

std::string same_weights(const std::map<std::string, std::string>& sums, const Trace& reference) {
  for (const auto& [file, sum] : reference.weights_sha256) {
    const auto mine = sums.find(file);
    if (mine != sums.end() && mine->second != sum) return "the weights differ: " + file;
  }
  return {};
}

std::string self_check(const Trace& trace) {
  std::map<std::tuple<int, int, std::string, std::string>, int> hashes;  // step, row, site, hash -> layer
  for (const TraceEvent& event : trace.events()) {
    if (!std::ranges::all_of(event.values, [](float v) { return std::isfinite(v); }))
      return fmt::format("{}: {} of step {} holds NaN or infinity", trace.where, event.name(), event.step);
    // A choice among few may well be the same in two layers.
    if (event.layer == kNoLayer || event.axes == "T E" || event.site == "probs") continue;
    const auto [known, is_new] =
        hashes.emplace(std::tuple(event.step, event.row, event.site, event.hash), event.layer);
    if (!is_new)
      return fmt::format("{}: {} of step {} is the very same as in layer {}: recorded twice?", trace.where,
                         event.name(), event.step, known->second);
  }
  return {};
}

std::string policy_summary(const std::string& policy) {
  const size_t slash = policy.find('/');
  const std::string precision = policy.substr(0, slash);
  const std::string kv = slash == std::string::npos ? "f32" : policy.substr(slash + 1);
  std::string text = precision == "q8"      ? "inputs of products rounded to 8 bits per block of 32"
                     : precision == "bf16"  ? "inputs of products rounded to 16-bit floats"
                     : precision == "fast"  ? "inputs of some products rounded to 8 bits per block of 32"
                     : precision == "exact" ? "inputs of products in 16-bit fixed point"
                                            : "f32 throughout";
  if (kv != "f32") text += ", keys and values in " + kv;
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

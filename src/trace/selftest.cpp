// The tool tested on itself: every fault into tiny checkpoints, the verdicts against what each fault
// declares.
#include <algorithm>
#include <set>

#include "format/presence.h"
#include "kernels/kernels.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/inject.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr int kRace = 25;  // the class that shows as runs that differ

// Folders below data/traces that hold a capture, each of the model of that name below data/models.
std::vector<std::string> captured(const fs::path& data) {
  std::vector<std::string> names;
  if (is_folder(data / "traces")) {
    for (const fs::path& entry : entries_of(data / "traces")) {
      if (is_there(entry / "manifest.json")) names.push_back(entry.filename().string());
    }
  }
  if (names.empty())
    fail(ErrorCode::not_found, "[{}] traces: expected captures to test with, got none", data.string());
  return names;
}

bool heads_as_declared(const Fault& fault, const SiteScore& first) {
  if (first.heads.empty()) return true;
  const auto count = static_cast<int>(first.heads.size());
  if (fault.heads == "all") return static_cast<int>(first.bad_heads.size()) == count;
  if (fault.heads == "1-")
    return static_cast<int>(first.bad_heads.size()) == count - 1 && first.bad_heads[0] == 1;
  if (fault.heads == "some")
    return !first.bad_heads.empty() && static_cast<int>(first.bad_heads.size()) < count;
  return true;
}

// Where the fault shows first in a trace of this level: its own site, or the next one there is.
std::string expected_site(const Fault& fault, const Trace& reference) {
  int best = static_cast<int>(Site::logits);
  for (const std::string& name : reference.sites) {
    const auto site = static_cast<int>(*find_site(name));
    if (site >= static_cast<int>(*find_site(fault.site))) best = std::min(best, site);
  }
  return std::string(site_name(static_cast<Site>(best)));
}

// The layer in which a fault acts first: one of the window in the first that has a window.
int first_layer(const Fault& fault, const fs::path& model) {
  const Checkpoint checkpoint = Checkpoint::open(model);
  const ModelFacts facts(checkpoint);
  const Injection injection = find_injection(fault.name);
  if (!injection.patch || !injection.patch(facts).contains("sliding_window")) return 0;
  return static_cast<int>(std::ranges::find_if(facts.windows, [](int64_t w) { return w > 0; }) -
                          facts.windows.begin());
}

bool localises(const Fault& fault, const fs::path& model, const Trace& reference, const DiffReport& report) {
  if (!report.first) return false;
  const SiteScore& first = *report.first;
  return first.site == expected_site(fault, reference) &&
         (first.layer == first_layer(fault, model) || first.layer == kNoLayer) &&
         first.step == (fault.decode_only ? 1 : 0) && first.row == fault.row &&
         heads_as_declared(fault, first);
}

std::string outcome(const DiffReport& report) {
  if (!report.first || report.verdict != Verdict::divergent) return report.reason;
  std::string heads;
  for (const int h : report.first->bad_heads) heads += (heads.empty() ? ", heads " : " ") + std::to_string(h);
  return report.reason + heads;
}

// The prefill of the shortest sequence alone: what many faults need is not there.
Trace shortest_prefill(const Trace& whole) {
  size_t row = 0;
  for (size_t s = 0; s < whole.sequences.size(); ++s)
    if (whole.sequences[s].ids.size() < whole.sequences[row].ids.size()) row = s;
  Trace part;
  part.engine = whole.engine;
  part.level = whole.level;
  part.where = whole.where;
  part.sites = whole.sites;
  part.sequences = {{whole.sequences[row].ids, {}}};
  for (const TraceEvent& event : whole.events()) {
    if (event.step != 0 || event.row != static_cast<int>(row)) continue;
    TraceEvent kept = event;
    kept.row = 0;
    part.add(std::move(kept), event.values);
  }
  return part;
}

struct Runner {
  fs::path model;
  Trace reference;
  Floor floor;

  DiffReport run(const std::string& fault, const std::string& isa = {}, int threads = 0) const {
    return diff(record_trace(model, options(fault, isa, threads)), reference, floor);
  }
  TraceOptions options(const std::string& fault, const std::string& isa = {}, int threads = 0) const {
    TraceOptions options;
    options.sequences = reference.sequences;
    options.level = reference.level;
    options.ties = {&reference, &floor};
    options.fault = fault;
    options.model.isa = isa;
    options.model.threads = threads;
    return options;
  }
};

}  // namespace

SelftestResult selftest(const fs::path& data, const std::function<void(double)>& progress) {
  SelftestResult result;
  const std::vector<std::string> names = captured(data);
  std::set<std::string> acted;
  int64_t runs = 0, detected = 0, localised = 0;
  const auto clean = [&](const std::string& fault, const std::string& name, const DiffReport& report,
                         bool can_act) {
    ++result.clean_runs;
    const bool alarm = report.verdict != Verdict::within;
    result.false_alarms += alarm ? 1 : 0;
    result.cases.push_back({fault, name, can_act, alarm, false, outcome(report)});
  };
  for (size_t i = 0; i < names.size(); ++i) {
    const Runner runner{data / "models" / names[i], Trace::open(data / "traces" / names[i]),
                        Floor(data / "traces" / names[i] / "floor.json", "f32/f32")};
    for (const kernels::Table* table : kernels::available()) {
      for (const int threads : {1, 2})
        clean("", names[i] + ", " + std::string(table->isa), runner.run("", std::string(table->isa), threads),
              true);
    }
    const Runner brief{runner.model, shortest_prefill(runner.reference), runner.floor};
    for (const Fault& fault : faults()) {
      for (const Runner* each : {&runner, &brief}) {
        const TraceOptions options = each->options(fault.name);
        const bool can_act = !cannot_act(fault, runner.model, options);
        if (can_act && each == &brief) continue;
        const Trace trace = record_trace(runner.model, options);
        const DiffReport report = diff(trace, each->reference, runner.floor);
        if (!can_act) {
          clean(fault.name, names[i], report, false);
          continue;
        }
        const bool found = report.verdict == Verdict::divergent;
        bool right = found && localises(fault, runner.model, runner.reference, report);
        if (fault.kind == kRace) {
          const auto changed = first_change(trace, record_trace(runner.model, options));
          right = right && changed && changed->site == fault.site;
        }
        acted.insert(fault.name);
        ++runs;
        detected += found ? 1 : 0;
        localised += right ? 1 : 0;
        result.cases.push_back({fault.name, names[i], true, found, right, outcome(report)});
      }
    }
    if (progress) progress(static_cast<double>(i + 1) / static_cast<double>(names.size()));
  }
  result.faults = static_cast<int64_t>(acted.size());
  result.detected = static_cast<double>(detected) / static_cast<double>(std::max<int64_t>(1, runs));
  result.localised = static_cast<double>(localised) / static_cast<double>(std::max<int64_t>(1, runs));
  return result;
}

}  // namespace lockstep

// selftest: known faults, and whether each is found where it is.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli.h"
#include "lockstep/divergence.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct SelftestFlags {
  std::string data = LOCKSTEP_DATA;
  bool json = false;
};

void run_selftest(const SelftestFlags& flags) {
  const SelftestResult result = selftest(flags.data, interruptible("Self-test"));
  if (flags.json) {
    nlohmann::json cases = nlohmann::json::array();
    for (const auto& each : result.cases) {
      cases.push_back({{"fault", each.fault},
                       {"model", each.model},
                       {"can_act", each.can_act},
                       {"detected", each.detected},
                       {"localised", each.localised},
                       {"outcome", each.outcome}});
    }
    const nlohmann::json out = {{"faults", result.faults},
                                {"detected", result.detected},
                                {"localised", result.localised},
                                {"clean_runs", result.clean_runs},
                                {"false_alarms", result.false_alarms},
                                {"cases", cases}};
    std::printf("%s\n", out.dump(1).c_str());
  } else {
    for (const auto& each : result.cases) {
      const bool clean = each.fault.empty() || !each.can_act;
      if (clean && !each.detected) continue;
      std::printf("%-9s %-28s %-16s %s\n",
                  clean            ? "ALARM"
                  : each.localised ? "found"
                  : each.detected  ? "elsewhere"
                                   : "MISSED",
                  each.fault.empty() ? "clean" : each.fault.c_str(), each.model.c_str(),
                  each.outcome.c_str());
    }
    std::printf(
        "%lld faults, %.1f %% detected, %.1f %% at the right place; %lld clean runs, %lld false alarms\n",
        static_cast<long long>(result.faults), 100 * result.detected, 100 * result.localised,
        static_cast<long long>(result.clean_runs), static_cast<long long>(result.false_alarms));
  }
  if (result.detected < 1 || result.localised < 0.95 || result.false_alarms > 0)
    throw CLI::RuntimeError(kDivergent);
}

}  // namespace

void declare_selftest(CLI::App& app) {
  auto flags = std::make_shared<SelftestFlags>();
  CLI::App* verb =
      app.add_subcommand("selftest", "Inject known faults and see whether each is found where it is");
  verb->add_option("--data", flags->data, "where the committed traces are; default: in the sources")
      ->type_name("DIR");
  verb->add_flag("--json", flags->json, "print one JSON object");
  verb->footer(
      "Each fault is put into our own engine, on tiny models with committed traces of transformers; "
      "clean runs must raise no alarm. docs/faults.md tells what each fault does.\n"
      "Exit status: 0 all found, 1 one missed or an alarm in a clean run, 3 a wrong command line or file.\n"
      "Example:\n  lockstep selftest");
  verb->callback([flags] { or_usage([&] { run_selftest(*flags); }); });
}

}  // namespace lockstep::cli

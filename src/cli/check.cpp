// check: invariants that need no reference.
#include <cstdio>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/hub.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct CheckFlags {
  ModelFlags model;
  int64_t length = 97;
  std::string fault;
};

void run_check(const CheckFlags& flags) {
  const ModelOptions options = flags.model.options();
  const auto model = resolve_model(flags.model.model);
  TraceOptions repeated;  // what check runs a fault in
  repeated.sequences = {{std::vector<int32_t>(static_cast<size_t>(flags.length)), {}}};
  repeated.steps = 2;
  require_acting(flags.fault, model, repeated);
  int held = 0, broken = 0;
  check_model(model, options, flags.model.kv(), flags.length, flags.fault, [&](const CheckResult& each) {
    std::printf("%-6s %s\n", each.held ? "held" : "BROKEN", each.name.c_str());
    std::fflush(stdout);
    (each.held ? held : broken) += 1;
  });
  std::printf("%d held, %d broken\n", held, broken);
  if (broken > 0) throw CLI::RuntimeError(kDivergent);
}

}  // namespace

void declare_check(CLI::App& app) {
  auto flags = std::make_shared<CheckFlags>();
  CLI::App* verb = app.add_subcommand("check", "Invariants that need no reference, on any model file");
  flags->model.declare_f32(*verb);
  verb->add_option("--length", flags->length, "tokens of the random text")
      ->check(in_range(int64_t{2}, int64_t{1} << 20))
      ->capture_default_str();
  declare_inject(*verb, flags->fault, "compute wrongly on purpose, as for trace; list: names the faults");
  verb->footer(
      "Logits must be the same, bit for bit, for any number of threads, chunks, batch and reuse of the "
      "cache; "
      "attention, RoPE, grouped queries, experts and windows must keep what they promise by definition.\n"
      "Exit status: 0 all held, 1 one is broken, 2 cannot conclude, 3 a wrong command line or file.\n"
      "Example:\n  lockstep check -m model.gguf");
  verb->callback([flags] { or_inconclusive([&] { run_check(*flags); }, &flags->model); });
}

}  // namespace lockstep::cli

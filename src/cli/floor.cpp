// floor: how far correct computations are apart.
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct FloorFlags {
  std::string truth, policy = "f32/f32", out;
  std::vector<std::string> variants;
};

void run_floor(const FloorFlags& flags) {
  or_inconclusive([&] {
    std::vector<Trace> variants;
    for (const std::string& each : flags.variants) {
      variants.push_back(Trace::open(each));
      std::error_code unknown;
      if (std::filesystem::equivalent(each, flags.truth, unknown))
        throw Error(
            ErrorCode::invalid_argument,
            "[" + each + "] variant: expected another computation than the truth, got the same trace");
    }
    const std::string floor = measure_floor(Trace::open(flags.truth), variants, flags.policy);
    const auto parsed = nlohmann::json::parse(floor);
    for (const auto& warning : parsed.at("warnings"))
      print_error("[floor] warning: " + warning.get<std::string>());
    save_text(flags.out, floor + "\n");
    std::fprintf(stderr, "%s: the noise floor of %s\n", flags.out.c_str(), flags.policy.c_str());
  });
}

}  // namespace

void declare_floor(CLI::App& app) {
  auto flags = std::make_shared<FloorFlags>();
  CLI::App* verb = app.add_subcommand("floor", "Measure how far correct computations are apart");
  verb->add_option("truth", flags->truth, "trace of the most exact one")->type_name("DIR")->required();
  verb->add_option("variants", flags->variants, "traces of others that are right too")
      ->type_name("DIR")
      ->required();
  verb->add_option("--policy", flags->policy, "precision/kv_type that they stand for")->capture_default_str();
  verb->add_option("-o,--out", flags->out, "file to write")->type_name("FILE")->required();
  verb->footer(
      "python -m lockstep.capture measures the floor of transformers by itself.\n"
      "Example:\n  lockstep floor truth eager sdpa -o floor.json");
  verb->callback([flags] { run_floor(*flags); });
}

}  // namespace lockstep::cli

#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli.h"
#include "errors.h"
#include "lockstep/bench.h"

namespace lockstep::cli {
namespace {

struct Flags {
  ModelFlags model;
  BenchOptions bench;
  bool json = false;
};

nlohmann::json spread_json(const Spread& spread) {
  return {{"median", spread.median}, {"least", spread.least}, {"most", spread.most}};
}

// What bounds the products of a prefill: its name, and operations a second.
struct Peak {
  const char* name;
  double gops;
};
Peak prefill_peak(const Model& model, const MachineLimits& limits) {
  if (model.precision() != Precision::f32 && model.info().integers) return {"int8", limits.int8_gops};
  if (model.precision() == Precision::fast && limits.bf16_gops > 0) return {"bf16", limits.bf16_gops};
  return {"f32", limits.f32_gops};
}

void print_json(const Model& model, const BenchOptions& options, const BenchResult& result,
                const MachineLimits& limits, double decode_share, const Peak& peak) {
  const nlohmann::json out = {
      {"prefill_tps", result.prefill_tps.median},
      {"decode_tps", result.decode_tps.median},
      {"prefill_spread", spread_json(result.prefill_tps)},
      {"decode_spread", spread_json(result.decode_tps)},
      {"decode_gbs", result.decode_gbs},
      {"prefill_gops", result.prefill_gops},
      {"limits",
       {{"read_gbs", limits.read_gbs},
        {"int8_gops", limits.int8_gops},
        {"bf16_gops", limits.bf16_gops},
        {"f32_gops", limits.f32_gops}}},
      {"decode_share", decode_share},
      {"prefill_share", result.prefill_gops / peak.gops},
      {"prefill_limit", peak.name},
      {"token_bytes", result.token_bytes},
      {"prefill", options.prefill},
      {"decode", options.decode},
      {"depth", options.depth},
      {"streams", options.streams},
      {"repeat", options.repeat},
      {"threads", model.threads()},
      {"isa", model.isa()},
      {"precision", precision_name(model.precision())},
      {"kv_type", kv_type_name(options.session.kv_type.value_or(default_kv_type(model.precision())))}};
  std::printf("%s\n", out.dump().c_str());
}

void run(Flags flags) {
  const auto model = flags.model.load();
  flags.bench.session = flags.model.session_options();
  flags.bench.progress = interruptible("Measuring");
  const BenchResult result = run_bench(model, flags.bench);
  const MachineLimits limits = measure_limits(model->threads(), flags.model.isa);
  const double decode_share = result.decode_gbs / limits.read_gbs;
  const Peak peak = prefill_peak(*model, limits);
  if (flags.json) {
    print_json(*model, flags.bench, result, limits, decode_share, peak);
    return;
  }
  const auto row = [](const char* what, int64_t tokens, const Spread& tps, double rate, const char* unit,
                      double share, const char* limit) {
    std::printf("%-8s %5lld tokens  %8.1f tokens/s (%.1f to %.1f)  %7.1f %s, %.0f %% of %s\n", what,
                static_cast<long long>(tokens), tps.median, tps.least, tps.most, rate, unit, share * 100,
                limit);
  };
  std::string task = counted(flags.bench.repeat, "round");
  if (flags.bench.streams > 1) task += " of " + counted(flags.bench.streams, "stream");
  if (flags.bench.depth > 0) task += " behind " + counted(flags.bench.depth, "token");
  std::printf("%s, %s, %s; %s, median (least to most)\n", std::string(model->isa()).c_str(),
              std::string(precision_name(model->precision())).c_str(),
              counted(model->threads(), "thread").c_str(), task.c_str());
  row("prefill", flags.bench.prefill, result.prefill_tps, result.prefill_gops, "Gop/s",
      result.prefill_gops / peak.gops, peak.name);
  row("decode", flags.bench.decode, result.decode_tps, result.decode_gbs, "GB/s", decode_share, "read");
  std::printf("limits   read %.1f GB/s, int8 %.0f, bf16 %.0f, f32 %.0f Gop/s\n", limits.read_gbs,
              limits.int8_gops, limits.bf16_gops, limits.f32_gops);
}

}  // namespace

void declare_bench(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb =
      app.add_subcommand("bench", "Measure prefill and decode beside the limits of this machine");
  flags->model.declare(*verb);
  BenchOptions& bench = flags->bench;
  const CLI::Validator positive = in_range(int64_t{1}, int64_t{1} << 30);
  verb->add_option("--prefill", bench.prefill, "tokens of the prompt")
      ->check(positive)
      ->capture_default_str();
  verb->add_option("--decode", bench.decode, "tokens generated one by one")
      ->check(positive)
      ->capture_default_str();
  verb->add_option("--streams", bench.streams, "sessions decoded together")
      ->check(in_range(int64_t{1}, int64_t{1024}))
      ->capture_default_str();
  verb->add_option("--depth", bench.depth, "tokens already in the session")
      ->check(in_range(int64_t{0}, int64_t{1} << 30))
      ->capture_default_str();
  verb->add_option("--repeat", bench.repeat, "rounds")->check(in_range(1, 1000))->capture_default_str();
  verb->add_flag("--json", flags->json, "print one JSON object");
  verb->footer(
      "Examples:\n"
      "  lockstep bench\n"
      "  lockstep bench -m model.gguf --prefill 512 --decode 64 --depth 4096 --json");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

// trace, diff, replay, selftest: finding the first wrong operation.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

constexpr int kDivergent = 1;
constexpr int kInconclusive = 2;
constexpr int kUsage = 3;

struct TraceFlags {
  ModelFlags model;
  std::optional<std::string> prompt, ids, ids_file, follow;
  int64_t steps = 0, chunk = 0;
  std::optional<int> level;
  std::string fault, out, validate, store = "full", layers;
  uint64_t seed = 0;
};

struct DiffFlags {
  ModelFlags model;
  std::string subject, reference, second, floor, policy, site, html, fault, bundle;
  bool json = false, graft = false;
};

struct FloorFlags {
  std::string truth, policy = "f32/f32", out;
  std::vector<std::string> variants;
};

struct CheckFlags {
  ModelFlags model;
  int64_t length = 97;
  std::string fault;
};

struct SelftestFlags {
  std::string data = LOCKSTEP_DATA;
  bool json = false;
};

// "1,2;3,4" as sequences.
std::vector<Trace::Sequence> sequences_of(const std::string& text) {
  std::vector<Trace::Sequence> all;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(';', begin), text.size());
    all.push_back({parse_ids(text.substr(begin, end - begin)), {}});
    begin = end + 1;
  }
  return all;
}

// "7" or "7-9".
std::pair<int, int> parse_layers(const std::string& text) {
  const std::string_view both = text;
  const size_t dash = both.find('-');
  int first = 0, last = 0;
  const bool numbers = parse_number(both.substr(0, dash), first) &&
                       parse_number(dash == text.npos ? both : both.substr(dash + 1), last);
  if (!numbers || first < 0 || last < first)
    throw Error(ErrorCode::invalid_argument, "[trace] layers: expected N or FIRST-LAST, got " + text);
  return {first, last};
}

bool present(const std::filesystem::path& path) {
  std::error_code unknown;
  return std::filesystem::exists(path, unknown);
}

// Reads the floor beside a reference; false: there is none of this policy.
bool measured(const std::filesystem::path& reference, const ModelFlags& flags, Floor& floor) {
  try {
    if (!present(reference / "floor.json")) return false;
    floor = Floor(reference / "floor.json", flags.precision + "/" + flags.kv_type);
    return true;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::invalid_argument) return false;
    throw;
  }
}

void run_trace(const TraceFlags& flags) {
  if (!flags.validate.empty()) {
    const Trace trace = Trace::open(flags.validate);
    std::printf("%s: %s, %s, %s, level %d, policy %s/%s: well formed\n", flags.validate.c_str(),
                printable(trace.engine).c_str(), counted(std::ssize(trace.events()), "tensor").c_str(),
                counted(std::ssize(trace.sequences), "sequence").c_str(), trace.level,
                trace.precision.c_str(), trace.kv_type.c_str());
    return;
  }
  if (flags.out.empty())
    throw Error(ErrorCode::invalid_argument, "[trace] -o: expected a directory to write, got none");
  const auto path = resolve_model(flags.model.model);
  TraceOptions options;
  options.model.precision = parse_precision(flags.model.precision);
  options.model.isa = flags.model.isa;
  options.model.threads = flags.model.threads;
  options.kv_type = flags.model.kv();
  options.steps = flags.steps;
  options.chunk = flags.chunk;
  options.level = flags.level.value_or(2);
  options.fault = flags.fault;
  options.storage = parse_storage(flags.store, flags.seed);
  if (!flags.layers.empty()) options.layers = parse_layers(flags.layers);
  options.checksums = true;
  Trace followed;
  Floor floor;
  if (flags.follow) {
    std::error_code unknown;
    if (std::filesystem::equivalent(*flags.follow, flags.out, unknown))
      throw Error(ErrorCode::invalid_argument,
                  "[" + flags.out + "] -o: expected another directory than --follow");
    followed = Trace::open(*flags.follow);
    options.sequences = followed.sequences;
    if (measured(*flags.follow, flags.model, floor)) options.ties = {&followed, &floor};
    options.level = flags.level.value_or(followed.level);
  } else if (flags.prompt) {
    options.sequences = {{encode_prompt(*open_model(path), *flags.prompt, {}, false), {}}};
  } else if (flags.ids || flags.ids_file) {
    options.sequences = sequences_of(flags.ids ? *flags.ids : read_text(*flags.ids_file));
  } else {
    throw Error(ErrorCode::invalid_argument,
                "[trace] input: expected -p, --ids, --ids-file or --follow, got none");
  }
  require_acting(options.fault, path, options);
  const int64_t tensors = record_trace_to(flags.out, path, options);
  std::printf("%s: %s of %s\n", flags.out.c_str(), counted(tensors, "tensor").c_str(),
              counted(std::ssize(options.sequences), "sequence").c_str());
}

Floor floor_of(const DiffFlags& flags, const std::string& policy) {
  if (!flags.floor.empty()) return {flags.floor, policy};
  const std::filesystem::path beside = std::filesystem::path(flags.reference) / "floor.json";
  if (present(beside)) return {beside, policy};
  const bool swapped = present(std::filesystem::path(flags.subject) / "floor.json");
  if (!flags.policy.empty()) {
    throw Error(ErrorCode::invalid_argument,
                std::string("[diff] --policy: expected floor.json beside the reference, or --floor, got ") +
                    (swapped ? "one beside the subject: name the subject first, then the reference"
                             : "neither; python -m lockstep.capture measures it with transformers"));
  }
  if (swapped) {
    std::fprintf(stderr,
                 "lockstep: floor.json lies beside the subject, %s; the subject is named first, then the "
                 "reference\n",
                 flags.subject.c_str());
  }
  return {};
}

void finish(const DiffFlags& flags, const DiffReport& report) {
  if (!flags.html.empty()) {
    save_text(flags.html, report_html(report));
    std::fprintf(stderr, "%s: the report, for a browser\n", flags.html.c_str());
  }
  std::fputs(flags.json ? (report_json(report) + "\n").c_str()
                        : report_text(report, isatty(STDOUT_FILENO) != 0).c_str(),
             stdout);
  if (report.verdict == Verdict::divergent) throw CLI::RuntimeError(kDivergent);
  if (report.verdict == Verdict::inconclusive) throw CLI::RuntimeError(kInconclusive);
}

bool loads(const std::string& model) {
  try {
    open_model(resolve_model(model));
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Runs a verb to the end of its output: what it says decides only if it was said.
template <typename Run>
void to_the_end(Run run) {
  try {
    run();
  } catch (const CLI::Error&) {
    if (!finish_output()) throw CLI::RuntimeError(kUsage);
    throw;
  }
  if (!finish_output()) throw CLI::RuntimeError(kUsage);
}

// What the comparing verbs cannot read is neither a difference nor none; a model that does not load is a
// matter of usage.
template <typename Run>
void or_inconclusive(Run run, const ModelFlags* flags = nullptr) {
  try {
    to_the_end(run);
  } catch (const Error& error) {
    print_error(error.what());
    const bool usage = error.code() == ErrorCode::not_found || error.code() == ErrorCode::invalid_argument ||
                       error.code() == ErrorCode::io || (flags != nullptr && !loads(flags->model));
    throw CLI::RuntimeError(usage ? kUsage : kInconclusive);
  } catch (const CLI::Error&) {
    throw;
  } catch (const std::exception& error) {
    print_error(error.what());
    throw CLI::RuntimeError(kInconclusive);
  }
}

// The verbs that compare nothing conclude nothing either.
template <typename Run>
void or_usage(Run run) {
  try {
    to_the_end(run);
  } catch (const Error& error) {
    print_error(error.what());
    throw CLI::RuntimeError(kUsage);
  }
}

void run_diff(const DiffFlags& flags) {
  or_inconclusive([&] {
    const Trace subject = Trace::open(flags.subject);
    const Trace reference = Trace::open(flags.reference);
    const Floor floor =
        floor_of(flags, flags.policy.empty() ? subject.precision + "/" + subject.kv_type : flags.policy);
    finish(flags, flags.second.empty() ? diff(subject, reference, floor)
                                       : diff(subject, reference, Trace::open(flags.second), floor));
  });
}

// What replay and bisect run our model with.
TraceOptions options_of(const DiffFlags& flags) {
  TraceOptions options;
  options.model.precision = parse_precision(flags.model.precision);
  options.model.isa = flags.model.isa;
  options.model.threads = flags.model.threads;
  options.kv_type = flags.model.kv();
  options.fault = flags.fault;
  return options;
}

TraceOptions following(TraceOptions options, const Trace& reference) {
  options.sequences = reference.sequences;
  return options;
}

void run_bisect(const DiffFlags& flags) {
  or_inconclusive(
      [&] {
        const TraceOptions options = options_of(flags);
        const auto model = resolve_model(flags.model.model);
        const Trace reference = Trace::open(flags.reference);
        const Floor floor = floor_of(flags, flags.model.precision + "/" + flags.model.kv_type);
        require_acting(flags.fault, model, following(options, reference));
        finish(flags, bisect(model, options, reference, floor, flags.graft));
      },
      &flags.model);
}

// A file that is no safetensors at all is a slip of the hand; one that is, but damaged, decides nothing.
void require_bundle(const std::string& path) {
  constexpr std::streamsize kLength = 8;  // of the header, before it
  char start[kLength + 1] = {};
  std::ifstream(path, std::ios::binary).read(start, sizeof start);
  if (start[kLength] != '{')
    throw Error(ErrorCode::invalid_argument,
                "[" + path + "] reference: expected a trace's directory or a bundle of replay, got neither");
}

void run_replay(const DiffFlags& flags) {
  or_inconclusive(
      [&] {
        const TraceOptions options = options_of(flags);
        std::error_code unknown;
        if (std::filesystem::is_regular_file(flags.reference, unknown)) {
          require_bundle(flags.reference);
          if (!flags.fault.empty() || !flags.site.empty() || !flags.bundle.empty() || !flags.floor.empty()) {
            throw Error(
                ErrorCode::invalid_argument,
                "[replay] bundle: expected neither --inject, --site, --bundle nor --floor, got one: it holds "
                "one operation and its floor");
          }
          return finish(flags, replay_bundle(flags.reference, options.model));
        }
        const std::string policy = flags.model.precision + "/" + flags.model.kv_type;
        const auto model = resolve_model(flags.model.model);
        const Trace reference = Trace::open(flags.reference);
        require_acting(flags.fault, model, following(options, reference));
        const DiffReport report = replay(model, options, reference, floor_of(flags, policy), flags.site);
        if (!flags.bundle.empty() && !report.scores.empty()) {
          require_other_file(flags.bundle, model);
          write_bundle(flags.bundle, model, reference, report.first ? *report.first : report.scores.at(0),
                       policy);
          std::fprintf(stderr, "%s: run it again with lockstep replay %s%s\n", flags.bundle.c_str(),
                       flags.bundle.c_str(),
                       flags.fault.empty() ? "" : "; the fault of --inject is not in it");
        }
        finish(flags, report);
      },
      &flags.model);
}

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

void run_check(const CheckFlags& flags) {
  ModelOptions options;
  options.precision = parse_precision(flags.model.precision);
  options.isa = flags.model.isa;
  options.threads = flags.model.threads;
  const auto model = resolve_model(flags.model.model);
  TraceOptions repeated;  // what check runs a fault in
  repeated.sequences = {{std::vector<int32_t>(static_cast<size_t>(flags.length)), {}}};
  repeated.steps = 2;
  require_acting(flags.fault, model, repeated);
  bool all = true;
  for (const CheckResult& each : check_model(model, options, flags.model.kv(), flags.length, flags.fault)) {
    std::printf("%-6s %s\n", each.held ? "held" : "BROKEN", each.name.c_str());
    all = all && each.held;
  }
  if (!all) throw CLI::RuntimeError(kDivergent);
}

void run_selftest(const SelftestFlags& flags) {
  const SelftestResult result = selftest(flags.data, [](double share) { show_progress("Self-test", share); });
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

void declare_comparison(CLI::App& verb, DiffFlags& flags) {
  verb.add_option("--floor", flags.floor, "noise floor of the reference; default: floor.json beside it")
      ->type_name("FILE");
  verb.add_flag("--json", flags.json, "print one JSON object instead of the screen");
  verb.add_option("--html", flags.html, "write a report in one HTML file besides")->type_name("FILE");
}

}  // namespace

void declare_inject(CLI::App& verb, std::string& fault, const std::string& description) {
  const auto list = [](const std::string& text) {
    if (text != "list") return;
    to_the_end([] {
      for (const Fault& each : faults()) {
        std::printf("%-28s %2d  %-14s %s\n", each.name.c_str(), each.kind, each.site.c_str(),
                    each.summary.c_str());
      }
    });
    throw CLI::Success();
  };
  verb.add_option("--inject", fault, description)->type_name("FAULT")->each(list);
}

void declare_trace(CLI::App& app) {
  auto flags = std::make_shared<TraceFlags>();
  CLI::App* verb = app.add_subcommand("trace", "Record what the model computes, operation by operation");
  flags->model.precision = "f32";
  flags->model.kv_type = "f32";
  flags->model.declare(*verb, false);
  auto* input = verb->add_option_group("input", "What to compute")->require_option(0, 1);
  input->add_option("-p,--prompt", flags->prompt, "a prompt")->type_name("TEXT");
  input->add_option("--ids", flags->ids, "token ids divided by commas; several sequences divided by ;")
      ->type_name("IDS");
  input->add_option("--ids-file", flags->ids_file, "a file of ids")->type_name("FILE");
  input->add_option("--follow", flags->follow, "the tokens of this trace, decode steps included")
      ->type_name("DIR");
  verb->add_option("--steps", flags->steps, "decode steps after the prompt")
      ->check(in_range(int64_t{0}, int64_t{1} << 20));
  verb->add_option("--chunk", flags->chunk, "tokens of a sequence in one pass of prefill; 0: all")
      ->check(in_range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  verb->add_option("--level", flags->level,
                   "0: logits, 1: layers, 2: every operation, 3: scores and experts too; "
                   "default: 2, or that of --follow")
      ->check(in_range(0, 3));
  declare_inject(*verb, flags->fault,
                 "compute wrongly on purpose: NAME or NAME@layer=N,head=A-B; list: names them");
  verb->add_option("--layers", flags->layers, "only the sites of these layers")->type_name("FIRST-LAST");
  verb->add_option("--store", flags->store,
                   "of each row keep all (full), some columns (sample:N) or random sums (sketch:N)")
      ->capture_default_str();
  verb->add_option("--seed", flags->seed, "of sample and sketch; must be that of the other trace")
      ->capture_default_str();
  verb->add_option("--validate", flags->validate, "only check that a trace is well formed")->type_name("DIR");
  verb->add_option("-o,--out", flags->out, "directory to write")->type_name("DIR");
  verb->footer(
      "Examples:\n"
      "  lockstep trace -m model --ids 1,2,3 --steps 4 -o mine\n"
      "  lockstep trace -m model --follow reference -o mine && lockstep diff mine reference\n"
      "  lockstep trace -m model --follow reference --store sample:64 -o small\n"
      "  lockstep trace --inject list");
  verb->callback([flags] {
    if (flags->validate.empty()) return or_usage([&] { run_trace(*flags); });
    or_inconclusive([&] { run_trace(*flags); });
  });
}

void declare_diff(CLI::App& app) {
  auto flags = std::make_shared<DiffFlags>();
  CLI::App* verb = app.add_subcommand("diff", "Name the first operation in which two traces differ");
  verb->add_option("subject", flags->subject, "trace to be judged")->type_name("DIR")->required();
  verb->add_option("reference", flags->reference, "trace to be trusted")->type_name("DIR")->required();
  verb->add_option("--second", flags->second, "another reference: tells who stands alone")->type_name("DIR");
  verb->add_option("--policy", flags->policy,
                   "judge by the floor of this policy, such as f32/f32; default: what the subject declares")
      ->type_name("PRECISION/KV");
  declare_comparison(*verb, *flags);
  verb->footer(
      "Exit status: 0 within the floor, 1 divergent, 2 cannot conclude, 3 a wrong command line or file.\n"
      "Example:\n  lockstep diff mine reference --html report.html");
  verb->callback([flags] { run_diff(*flags); });
}

void declare_replay(CLI::App& app) {
  auto flags = std::make_shared<DiffFlags>();
  CLI::App* verb =
      app.add_subcommand("replay", "Feed a reference's tensors to each operation of ours, one by one");
  flags->model.precision = "f32";
  flags->model.kv_type = "f32";
  flags->model.declare(*verb, false);
  verb->add_option("reference", flags->reference, "trace whose tensors are fed, or a bundle of one operation")
      ->type_name("DIR|FILE")
      ->required();
  verb->add_option("--site", flags->site, "only this operation, such as L00.q_rope")->type_name("SITE");
  declare_inject(*verb, flags->fault, "compute wrongly on purpose, as for trace; list: names the faults");
  verb->add_option(
          "--bundle", flags->bundle,
          "write the first wrong operation, or that of --site, with inputs, weight and expected output")
      ->type_name("FILE.safetensors");
  declare_comparison(*verb, *flags);
  verb->footer(
      "Tells the errors that operations make from those that they inherit. The trace must hold whole "
      "tensors.\n"
      "Examples:\n"
      "  lockstep replay -m model reference\n"
      "  lockstep replay -m model reference --site L00.q_rope --bundle q_rope.safetensors\n"
      "  lockstep replay q_rope.safetensors");
  verb->callback([flags] { run_replay(*flags); });
}

void declare_bisect(CLI::App& app) {
  auto flags = std::make_shared<DiffFlags>();
  CLI::App* verb = app.add_subcommand(
      "bisect", "Run the model against a reference: layers first, then the operations of the wrong one");
  flags->model.precision = "f32";
  flags->model.kv_type = "f32";
  flags->model.declare(*verb, false);
  verb->add_option("reference", flags->reference, "trace to be trusted")->type_name("DIR")->required();
  declare_inject(*verb, flags->fault, "compute wrongly on purpose, as for trace; list: names the faults");
  verb->add_flag(
      "--graft", flags->graft,
      "also find the last wrong layer, by feeding the reference's residuals: one fault or several");
  declare_comparison(*verb, *flags);
  verb->footer(
      "Keeps little of a long run: what lies between layers, then one layer.\n"
      "Exit status: 0 within the floor, 1 divergent, 2 cannot conclude, 3 a wrong command line or file.\n"
      "Example:\n  lockstep bisect -m model reference --graft");
  verb->callback([flags] { run_bisect(*flags); });
}

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

void declare_check(CLI::App& app) {
  auto flags = std::make_shared<CheckFlags>();
  CLI::App* verb = app.add_subcommand("check", "Invariants that need no reference, on any model file");
  flags->model.precision = "f32";
  flags->model.kv_type = "f32";
  flags->model.declare(*verb, false);
  verb->add_option("--length", flags->length, "tokens of the random text")
      ->check(in_range(int64_t{2}, int64_t{1} << 20))
      ->capture_default_str();
  declare_inject(*verb, flags->fault, "compute wrongly on purpose, as for trace; list: names the faults");
  verb->footer(
      "Logits must be the same, bit for bit, for any number of threads, chunks, batch and reuse of the "
      "cache;\n"
      "attention, RoPE, grouped queries, experts and windows must keep what they promise by definition.\n"
      "Exit status: 0 all held, 1 one is broken, 2 cannot conclude, 3 a wrong command line or file.\n"
      "Example:\n  lockstep check -m model.gguf");
  verb->callback([flags] { or_inconclusive([&] { run_check(*flags); }, &flags->model); });
}

void declare_selftest(CLI::App& app) {
  auto flags = std::make_shared<SelftestFlags>();
  CLI::App* verb =
      app.add_subcommand("selftest", "Inject known faults and see whether each is found where it is");
  verb->add_option("--data", flags->data, "where the committed traces are")
      ->type_name("DIR")
      ->capture_default_str();
  verb->add_flag("--json", flags->json, "print one JSON object");
  verb->footer(
      "Each fault is put into our own engine, on tiny models with committed traces of transformers;\n"
      "clean runs must raise no alarm. docs/faults.md tells what each fault does.\n"
      "Exit status: 0 all found, 1 one missed or an alarm in a clean run, 3 a wrong command line or file.\n"
      "Example:\n  lockstep selftest");
  verb->callback([flags] { or_usage([&] { run_selftest(*flags); }); });
}

}  // namespace lockstep::cli

// trace: what the model computes, operation by operation.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct TraceFlags {
  ModelFlags model;
  std::optional<std::string> prompt, ids, ids_file, follow;
  int64_t steps = 0, chunk = 0;
  std::optional<int> level;
  std::string fault, out, validate, store = "full", layers;
  uint64_t seed = 0;
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
  options.model = flags.model.options();
  options.kv_type = flags.model.kv();
  options.steps = flags.steps;
  options.chunk = flags.chunk;
  options.level = flags.level.value_or(2);
  options.fault = flags.fault;
  options.storage = parse_storage(flags.store, flags.seed);
  if (!flags.layers.empty()) options.layers = parse_layers(flags.layers);
  options.checksums = true;
  options.progress = interruptible("Recording");
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

}  // namespace

void declare_trace(CLI::App& app) {
  auto flags = std::make_shared<TraceFlags>();
  CLI::App* verb = app.add_subcommand("trace", "Record what the model computes, operation by operation");
  flags->model.declare_f32(*verb);
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
      "  lockstep trace -m model --follow reference -o mine\n"
      "  lockstep trace -m model --follow reference --store sample:64 -o small\n"
      "  lockstep trace --inject list");
  verb->callback([flags] {
    if (flags->validate.empty()) return or_usage([&] { run_trace(*flags); });
    or_inconclusive([&] { run_trace(*flags); });
  });
}

}  // namespace lockstep::cli

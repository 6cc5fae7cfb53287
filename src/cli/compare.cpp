// diff, replay, bisect: finding the first wrong operation against a reference.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct DiffFlags {
  ModelFlags model;
  std::string subject, reference, second, floor, policy, site, html, fault, bundle;
  bool json = false, graft = false;
};

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
  options.model = flags.model.options();
  options.kv_type = flags.model.kv();
  options.fault = flags.fault;
  options.progress = interruptible("Computing");
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
        if (!flags.bundle.empty() && !report.first && flags.site.empty()) {
          std::fprintf(stderr, "%s: not written, for no operation is wrong; --site names one\n",
                       flags.bundle.c_str());
        } else if (!flags.bundle.empty() && !report.scores.empty()) {
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

void declare_comparison(CLI::App& verb, DiffFlags& flags) {
  verb.add_option("--floor", flags.floor, "noise floor of the reference; default: floor.json beside it")
      ->type_name("FILE");
  verb.add_flag("--json", flags.json, "print one JSON object instead of the screen");
  verb.add_option("--html", flags.html, "write a report in one HTML file besides")->type_name("FILE");
}

}  // namespace

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
  flags->model.declare_f32(*verb);
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
      "  lockstep replay -m model reference --site L00.q_rope --bundle one.safetensors\n"
      "  lockstep replay one.safetensors");
  verb->callback([flags] { run_replay(*flags); });
}

void declare_bisect(CLI::App& app) {
  auto flags = std::make_shared<DiffFlags>();
  CLI::App* verb = app.add_subcommand(
      "bisect", "Run the model against a reference: layers first, then the operations of the wrong one");
  flags->model.declare_f32(*verb);
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

}  // namespace lockstep::cli

// Entry point: declares the verbs, runs the one named, and turns errors into one line.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <new>

#include "cli.h"
#include "errors.h"

namespace {

using lockstep::cli::kUsage;
using lockstep::cli::kWrongInput;

constexpr int kCutShort = 2;  // to the verbs that judge: cannot conclude

int run(int argc, char** argv) {
  CLI::App app(
      "Runs large language models on CPUs, from the files people have, and shows that it "
      "computes what the reference computes.",
      "lockstep");
  app.set_version_flag("--version", std::string("lockstep ") + LOCKSTEP_VERSION);
  app.require_subcommand(1);
  app.formatter(lockstep::cli::help_formatter());
  app.footer(
      "First steps:\n"
      "  lockstep pull smollm2              fetch a small model (92 MB)\n"
      "  lockstep generate -p Hello         a reply\n"
      "  lockstep VERB --help               all about one verb");
  for (const auto declare :
       {lockstep::cli::declare_generate, lockstep::cli::declare_chat, lockstep::cli::declare_tokenize,
        lockstep::cli::declare_logits, lockstep::cli::declare_perplexity, lockstep::cli::declare_inspect,
        lockstep::cli::declare_pull, lockstep::cli::declare_bench, lockstep::cli::declare_trace,
        lockstep::cli::declare_diff, lockstep::cli::declare_replay, lockstep::cli::declare_bisect,
        lockstep::cli::declare_floor, lockstep::cli::declare_check, lockstep::cli::declare_selftest}) {
    declare(app);
  }
  const std::string first = argc > 1 ? argv[1] : "";
  const bool help = first.empty() || first == "help";
  const std::string word = first == "help" && argc > 2 ? argv[2] : first;
  const auto verbs = app.get_subcommands([&](const CLI::App* verb) { return verb->get_name() == word; });
  if (argc > 1 && word[0] != '-' && word != "help" && verbs.empty()) {
    lockstep::cli::print_error(lockstep::cli::unknown_verb(app, word));
    return kUsage;
  }
  if (help) {
    std::fputs((verbs.empty() ? app.help() : verbs[0]->help("lockstep")).c_str(), stdout);
    if (argc > 1) return 0;
    std::fflush(stdout);  // before the line that says why nothing was done
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& asked) {
    const std::string mistaken = lockstep::cli::mistaken_help({argv + 1, argv + argc});
    if (mistaken.empty()) return app.exit(asked);
    lockstep::cli::print_error(mistaken);
    return kUsage;
  } catch (const CLI::Success& asked) {
    return app.exit(asked);
  } catch (const CLI::RuntimeError& verdict) {
    return verdict.get_exit_code();
  } catch (const CLI::ParseError& error) {
    lockstep::cli::print_error(lockstep::cli::usage_message(app, {argv, argv + argc}, error));
    return kUsage;
  } catch (const std::bad_alloc&) {
    lockstep::cli::print_error(
        "[memory] allocation: expected enough for this, got none; a shorter context (-c) "
        "or a smaller model needs less");
    return kWrongInput;
  } catch (const std::exception& error) {
    lockstep::cli::print_error(error.what());
    return kWrongInput;
  }
  return 0;
}

// Parts of models and traces are read through a map: where a file ends early meanwhile, so does this.
void end_of_map(int) {
  static constexpr char kMessage[] =
      "lockstep: [input] read: expected a file as it was when it was opened, got it cut short\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1);
  ::_exit(kCutShort);
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGBUS, end_of_map);
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is an error of the write, as a full disk is
  const int status = run(argc, argv);
  const bool written = lockstep::cli::finish_output();
  return status == 0 && !written ? kWrongInput : status;
}

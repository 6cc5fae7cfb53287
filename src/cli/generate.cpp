#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>

#include "cli.h"
#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"
#include "verdict.h"

namespace lockstep::cli {
namespace {

struct Flags {
  ModelFlags model;
  GenerateFlags generate;
  std::optional<std::string> prompt, prompt_file, standard_input, system;
  std::optional<int64_t> logprobs;
  std::string fault;
  bool raw = false;
  bool json = false;
};

nlohmann::json logprobs_json(const Tokenizer& tokenizer, const std::vector<Logprobs>& all) {
  const auto entry = [&](const TokenLogprob& token) {
    return nlohmann::json{
        {"id", token.id}, {"token", tokenizer.decode({&token.id, 1}, false)}, {"logprob", token.logprob}};
  };
  nlohmann::json list = nlohmann::json::array();
  for (const Logprobs& each : all) {
    nlohmann::json token = entry(each.chosen);
    token["top"] = nlohmann::json::array();
    for (const TokenLogprob& other : each.top) token["top"].push_back(entry(other));
    list.push_back(token);
  }
  return list;
}

std::string hexadecimal(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::string prompt_text(const Flags& flags) {
  if (flags.prompt) return *flags.prompt;
  if (flags.prompt_file) return read_text(*flags.prompt_file);
  return read_text("-");
}

// The reply as JSON, or what is said of it behind its text.
void report(const Flags& flags, const Model& model, std::span<const int32_t> prompt, const Generation& result,
            double load_ms) {
  const Timings& t = result.timings;
  if (flags.json) {
    nlohmann::json out = {{"text", result.text},
                          {"prompt_ids", prompt},
                          {"ids", result.ids},
                          {"finish_reason", interrupted() ? "interrupted" : result.finish_reason},
                          {"logits_hash", hexadecimal(result.logits_hash)},
                          {"isa", model.isa()},
                          {"precision", precision_name(model.precision())},
                          {"kv_type", kv_type_name(flags.model.kv())},
                          {"threads", model.threads()},
                          {"timings",
                           {{"load_ms", load_ms},
                            {"ttft_ms", t.ttft_ms},
                            {"pack_ms", t.pack_ms},
                            {"prefill_tps", t.prefill_tps},
                            {"decode_tps", t.decode_tps}}}};
    if (flags.logprobs) out["logprobs"] = logprobs_json(model.tokenizer(), result.logprobs);
    std::printf("%s\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    return;
  }
  if (t.ttft_ms == 0) {
    std::fprintf(stderr, "%zu prompt tokens | interrupted while they were read\n", prompt.size());
    return;
  }
  std::printf("\n");
  std::fflush(stdout);
  std::string more;
  if (t.pack_ms >= 1) more = ", then weights packed in " + std::to_string(std::lround(t.pack_ms)) + " ms";
  if (t.decode_tps > 0) {
    const double gbs = static_cast<double>(model.info().token_bytes) * t.decode_tps * 1e-9;
    char decode[80];
    std::snprintf(decode, sizeof(decode), " | decode %.1f tokens/s, %.1f GB/s", t.decode_tps, gbs);
    more += decode;
  }
  if (const std::string why = cut_short(result, flags.generate.options); !why.empty()) more += " | " + why;
  std::fprintf(stderr,
               "%zu prompt + %zu new tokens | prefill %.1f tokens/s, first after %.0f ms%s | %s, %s, %s | "
               "logits %s\n",
               prompt.size(), result.ids.size(), t.prefill_tps, t.ttft_ms, more.c_str(),
               std::string(model.isa()).c_str(), std::string(precision_name(model.precision())).c_str(),
               counted(model.threads(), "thread").c_str(), hexadecimal(result.logits_hash).c_str());
}

void run(const Flags& flags) {
  const std::string text = prompt_text(flags);
  const auto start = std::chrono::steady_clock::now();
  std::optional<FaultObserver> fault;
  if (!flags.fault.empty()) fault.emplace(flags.fault, resolve_model(flags.model.model));
  const auto model = flags.model.load(Packing::second_pass, fault ? fault->config_patch() : "");
  const std::chrono::duration<double, std::milli> load = std::chrono::steady_clock::now() - start;
  GenerateOptions options = flags.generate.options;
  options.logprobs = flags.logprobs;
  options.observer = fault ? &*fault : nullptr;
  options.on_prompt = show_prompt;
  const std::vector<int32_t> prompt = encode_prompt(*model, text, flags.system, flags.raw);
  TraceOptions text_of_one;
  text_of_one.sequences = {{prompt, {}}};
  text_of_one.steps = std::clamp<int64_t>(options.max_tokens - 1, 0, int64_t{1} << 20);
  require_acting(flags.fault, resolve_model(flags.model.model), text_of_one);
  Session session(model, flags.model.session_options());
  catch_interrupts(true);
  const Generation result = generate(session, prompt, options, [&](std::string_view piece) {
    if (flags.json) return !interrupted();
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    return !interrupted() && std::ferror(stdout) == 0;
  });
  hide_progress();
  report(flags, *model, prompt, result, load.count());
  if (interrupted()) throw CLI::RuntimeError(kInterrupted);
}

}  // namespace

std::string cut_short(const Generation& reply, const GenerateOptions& options) {
  if (interrupted()) return "interrupted";
  if (reply.finish_reason != "length") return "";
  const bool all = std::ssize(reply.ids) >= options.max_tokens;
  return all ? "cut at -n " + std::to_string(options.max_tokens)
             : std::string("cut: the context is full, -c");
}

void declare_generate(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("generate", "Continue a prompt; the text streams to stdout");
  flags->model.declare(*verb);
  auto* source = verb->add_option_group("prompt", "What to continue (exactly one)");
  source->add_option("-p,--prompt", flags->prompt, "the prompt itself")->type_name("TEXT");
  source->add_option("--prompt-file", flags->prompt_file, "a file holding it")->type_name("FILE");
  source->add_option("source", flags->standard_input, "- reads standard input")
      ->type_name("-")
      ->check([](const std::string& text) {
        return text == "-"
                   ? ""
                   : "expected - for standard input, got \"" + text + "\"; a prompt follows -p, a model -m";
      });
  source->require_option(1);
  verb->add_option("--system", flags->system, "a system message before it")->type_name("TEXT");
  verb->add_flag("--raw", flags->raw, "feed the text as it is, without the chat template");
  verb->add_option("--logprobs", flags->logprobs, "with --json: log-probabilities of this many tokens")
      ->check(in_range(int64_t{0}, int64_t{1000}));
  verb->add_flag("--json", flags->json, "print one JSON object instead of the text");
  flags->generate.declare(*verb);
  declare_inject(*verb, flags->fault, "compute wrongly on purpose: NAME or NAME@layer=N; list: names them");
  verb->footer(
      "Examples:\n"
      "  lockstep generate -p 'Name three colours.' -n 40\n"
      "  lockstep generate -m model.gguf --raw -p 'Once upon' --temp 0.8 --seed 7\n"
      "  git diff | lockstep generate - --system 'Summarise this change.'");
  verb->callback([flags] {
    if (flags->logprobs && !flags->json)
      throw CLI::ValidationError("--logprobs", "expected --json beside it, got none");
    run(*flags);
  });
}

}  // namespace lockstep::cli

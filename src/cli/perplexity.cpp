#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>

#include "cli.h"
#include "errors.h"
#include "lockstep/error.h"

namespace lockstep::cli {
namespace {

struct Flags {
  ModelFlags model;
  std::string file;
  std::optional<int64_t> window;
};

void run(const Flags& flags) {
  const auto model = flags.model.load();
  const std::vector<int32_t> ids = model->tokenizer().encode(read_text(flags.file), true);
  if (ids.size() < 2) {
    throw Error(ErrorCode::invalid_argument,
                "[" + flags.file + "] text: expected at least two tokens, got " + std::to_string(ids.size()));
  }
  SessionOptions options = flags.model.session_options();
  double sum = 0;
  double squares = 0;
  int64_t count = 0;
  const int64_t context = options.context > 0 ? options.context : model->info().context;
  if (context < flags.window.value_or(2)) {
    throw Error(ErrorCode::invalid_argument, "[perplexity] context: expected room for a window of " +
                                                 counted(flags.window.value_or(2), "token") + ", got " +
                                                 std::to_string(context));
  }
  // Windows overlap by one token, so that every token but the first is predicted once.
  const auto window = static_cast<size_t>(flags.window.value_or(std::min<int64_t>(512, context)));
  const auto progress = interruptible("Perplexity");
  for (size_t begin = 0; begin + 1 < ids.size(); begin += window - 1) {
    const size_t length = std::min(window, ids.size() - begin);
    Session session(model, options);
    const std::span<const int32_t> part(ids.data() + begin, length);
    for (size_t i = 0; i + 1 < length; i += 64) {
      const Tensor logits = session.append(part.subspan(i, std::min<size_t>(64, length - 1 - i)));
      for (int64_t r = 0; r < logits.shape()[0]; ++r) {
        const std::span<const float> row(logits.row(r), static_cast<size_t>(logits.row_size()));
        const double loss = -logprobs(row, part[i + r + 1], 0).chosen.logprob;
        sum += loss;
        squares += loss * loss;
        ++count;
      }
    }
    progress(static_cast<double>(begin + length) / static_cast<double>(ids.size()));
  }
  const double mean = sum / static_cast<double>(count);
  const double variance = std::max(0.0, squares / static_cast<double>(count) - mean * mean);
  const double error = std::sqrt(variance / static_cast<double>(count));
  std::printf("perplexity %.4f +- %.4f (%lld tokens, windows of %zu)\n", std::exp(mean),
              std::exp(mean) * error, static_cast<long long>(count), window);
}

}  // namespace

void declare_perplexity(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("perplexity", "How well the model predicts a text, with its error bar");
  flags->model.declare(*verb);
  verb->add_option("-f,--file", flags->file, "the text; - is standard input")->type_name("FILE")->required();
  verb->add_option("--window", flags->window,
                   "tokens the model sees at once; default: 512, or its context where that is shorter")
      ->check(in_range(int64_t{2}, int64_t{1} << 20));
  verb->footer("Example:\n  lockstep perplexity -f book.txt --window 1024");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

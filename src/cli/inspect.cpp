#include <cstdio>
#include <map>

#include "cli.h"
#include "errors.h"
#include "lockstep/checkpoint.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

struct Flags {
  std::string model;
  bool tensors = false;
};

std::string in_megabytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f MB", static_cast<double>(bytes) * 1e-6);
  return text;
}

void run(const Flags& flags) {
  const Checkpoint checkpoint = Checkpoint::open(resolve_model(flags.model));
  const Config& config = checkpoint.config();
  int64_t parameters = 0;
  int64_t bytes = 0;
  std::map<std::string, int64_t> formats;
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    parameters += tensor.shape.size();
    bytes += tensor.stored_bytes();
    formats[std::string(dtype_name(tensor.dtype))] += tensor.shape.size();
  }
  const int64_t heads = config.integer("num_attention_heads");
  const int64_t kv_heads = config.integer("num_key_value_heads", heads);
  const int64_t layers = config.integer("num_hidden_layers");
  const int64_t hidden = config.integer("hidden_size");
  const int64_t head_dim = config.integer("head_dim", hidden / std::max<int64_t>(heads, 1));
  std::printf("file          %s (%s)\n", checkpoint.path().c_str(), checkpoint.format().c_str());
  std::printf("architecture  %s\n", printable(checkpoint.architecture()).c_str());
  std::printf("layers        %lld, hidden %lld, vocabulary %lld\n", static_cast<long long>(layers),
              static_cast<long long>(hidden), static_cast<long long>(config.integer("vocab_size")));
  std::printf("heads         %lld query, %lld key/value, dimension %lld\n", static_cast<long long>(heads),
              static_cast<long long>(kv_heads), static_cast<long long>(head_dim));
  if (config.has("num_local_experts")) {
    std::printf("experts       %lld, %lld a token\n",
                static_cast<long long>(config.integer("num_local_experts")),
                static_cast<long long>(config.integer("num_experts_per_tok", 2)));
  }
  std::printf("context       %lld tokens, KV cache %s a 1000 tokens (f16)\n",
              static_cast<long long>(config.integer("max_position_embeddings", 2048)),
              in_megabytes(1000 * layers * kv_heads * head_dim * 2 * 2).c_str());
  std::printf("parameters    %.1f million in %s\n", static_cast<double>(parameters) * 1e-6,
              in_megabytes(bytes).c_str());
  for (const auto& [format, count] : formats) {
    std::printf("  %-11s %.1f million\n", format.c_str(), static_cast<double>(count) * 1e-6);
  }
  // Loading reads every key that matters, and says which it did not.
  const auto model = open_model(checkpoint.path());
  std::printf("tokenizer     %s, chat template %s\n", model->has_tokenizer() ? "yes" : "no",
              model->chat_template() != nullptr ? "yes" : "no");
  for (const std::string& key : model->info().unread_keys)
    std::printf("unread key    %s\n", printable(key).c_str());
  if (!flags.tensors) return;
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    std::printf("%-8s %-20s %s\n", std::string(dtype_name(tensor.dtype)).c_str(), tensor.shape.str().c_str(),
                printable(tensor.name).c_str());
  }
}

}  // namespace

void declare_inspect(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("inspect", "What a model's files hold");
  verb->add_option("model", flags->model, "as for -m elsewhere; default: SmolLM2-135M-Instruct")
      ->type_name("MODEL");
  verb->add_flag("--tensors", flags->tensors, "list every tensor");
  verb->footer("Example:\n  lockstep inspect model.gguf --tensors");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

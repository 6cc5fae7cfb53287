#include <cstdio>
#include <exception>
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

void print_files(const Checkpoint& checkpoint) {
  int64_t parameters = 0;
  int64_t bytes = 0;
  std::map<std::string, int64_t> formats;
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    parameters += tensor.shape.size();
    bytes += tensor.stored_bytes();
    formats[std::string(dtype_name(tensor.dtype))] += tensor.shape.size();
  }
  std::printf("file          %s (%s)\n", checkpoint.path().c_str(), checkpoint.format().c_str());
  std::printf("architecture  %s\n", printable(checkpoint.architecture()).c_str());
  std::printf("parameters    %.1f million in %s\n", static_cast<double>(parameters) * 1e-6,
              in_megabytes(bytes).c_str());
  for (const auto& [format, count] : formats) {
    std::printf("  %-11s %.1f million\n", format.c_str(), static_cast<double>(count) * 1e-6);
  }
}

void print_model(const Model& model) {
  const ModelInfo& info = model.info();
  const CacheShape cache = model.cache_shape();
  std::printf("layers        %lld, hidden %lld, vocabulary %lld\n", static_cast<long long>(info.layers),
              static_cast<long long>(info.hidden), static_cast<long long>(info.vocab));
  std::printf("heads         %lld query, %lld key/value, dimension %lld\n",
              static_cast<long long>(info.heads), static_cast<long long>(cache.kv_heads),
              static_cast<long long>(cache.head_dim));
  if (info.experts > 0) {
    std::printf("experts       %lld, %lld a token\n", static_cast<long long>(info.experts),
                static_cast<long long>(info.experts_per_token));
  }
  std::printf("context       %lld tokens, KV cache %s a 1000 tokens (f16)\n",
              static_cast<long long>(info.context),
              in_megabytes(1000 * cache.layers * cache.kv_heads * cache.head_dim * 2 * 2).c_str());
  std::printf("tokenizer     %s, chat template %s\n", model.has_tokenizer() ? "yes" : "no",
              model.chat_template() != nullptr ? "yes" : "no");
  for (const std::string& key : info.unread_keys) std::printf("unread key    %s\n", printable(key).c_str());
}

void print_tensors(const Checkpoint& checkpoint) {
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    std::printf("%-8s %-20s %s\n", std::string(dtype_name(tensor.dtype)).c_str(), tensor.shape.str().c_str(),
                printable(tensor.name).c_str());
  }
}

void run(const Flags& flags) {
  const Checkpoint checkpoint = Checkpoint::open(resolve_model(flags.model));
  print_files(checkpoint);
  std::exception_ptr refused;  // a model that cannot be run has tensors to look at all the same
  try {
    // Loading reads every key that matters, and says which it did not.
    print_model(*open_model(checkpoint.path()));
  } catch (const Error&) {
    refused = std::current_exception();
  }
  if (flags.tensors) print_tensors(checkpoint);
  std::fflush(stdout);  // before the line that says why it cannot be run
  if (refused) std::rethrow_exception(refused);
}

}  // namespace

void declare_inspect(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("inspect", "What a model's files hold");
  verb->add_option("-m,--model,model", flags->model, "as for -m elsewhere; default: smollm2")
      ->type_name("MODEL");
  verb->add_flag("--tensors", flags->tensors, "list every tensor");
  verb->footer(
      "Of a model that lockstep cannot run: what its files hold, and why; exit status 1.\n"
      "Example:\n  lockstep inspect model.gguf --tensors");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

#include <algorithm>
#include <cstdio>
#include <optional>

#include "cli.h"
#include "errors.h"
#include "lockstep/checkpoint.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

struct Flags {
  ModelFlags model;
  std::optional<std::string> ids, ids_file;
  int64_t batch = 1;
  int64_t chunk = 64;
  std::string output;
};

// Logits of `ids`, computed beside the same ids rotated by 1, 2, ... places, chunk by chunk.
Tensor logits_in_batch(const std::shared_ptr<const Model>& model, const SessionOptions& options,
                       const std::vector<int32_t>& ids, int64_t batch) {
  std::vector<Session> sessions;
  std::vector<Session*> pointers;
  std::vector<std::vector<int32_t>> rotated;
  sessions.reserve(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    pointers.push_back(&sessions.emplace_back(model, options));
    auto& copy = rotated.emplace_back(ids);
    std::rotate(copy.begin(), copy.begin() + b % static_cast<int64_t>(ids.size()), copy.end());
  }
  Tensor result({static_cast<int64_t>(ids.size()), model->info().vocab});
  for (size_t begin = 0; begin < ids.size(); begin += static_cast<size_t>(options.chunk)) {
    const size_t count = std::min(static_cast<size_t>(options.chunk), ids.size() - begin);
    std::vector<std::span<const int32_t>> parts;
    for (const auto& each : rotated) parts.emplace_back(each.data() + begin, count);
    const std::vector<Tensor> logits = append_together(pointers, parts);
    std::copy_n(logits[0].data(), logits[0].size(), result.row(static_cast<int64_t>(begin)));
  }
  return result;
}

void run(const Flags& flags) {
  const std::vector<int32_t> ids = parse_ids(flags.ids ? *flags.ids : read_text(*flags.ids_file));
  if (ids.empty()) throw Error(ErrorCode::invalid_argument, "[ids] list: expected at least one id, got none");
  require_other_file(flags.output, resolve_model(flags.model.model));
  const auto model = flags.model.load(Packing::second_pass);
  SessionOptions options = flags.model.session_options();
  options.chunk = flags.chunk;
  const Tensor logits = logits_in_batch(model, options, ids, flags.batch);
  const NamedTensor tensor = NamedTensor::of("logits", logits);
  save_tensors(flags.output, {&tensor, 1});
  std::fprintf(
      stderr, "%s: logits %s | %s, %s, KV %s, %s\n", flags.output.c_str(), logits.shape().str().c_str(),
      std::string(model->isa()).c_str(), std::string(precision_name(model->precision())).c_str(),
      std::string(kv_type_name(flags.model.kv())).c_str(), counted(model->threads(), "thread").c_str());
}

}  // namespace

void declare_logits(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("logits", "Write the logits of given ids to a safetensors file");
  flags->model.declare(*verb);
  auto* source = verb->add_option_group("input", "Which tokens (exactly one)");
  source->add_option("--ids", flags->ids, "ids divided by commas")->type_name("IDS");
  source->add_option("--ids-file", flags->ids_file, "a file of ids; - is standard input")->type_name("FILE");
  source->require_option(1);
  verb->add_option("--batch", flags->batch, "run beside this many less one other sequences")
      ->check(in_range(int64_t{1}, int64_t{1024}))
      ->capture_default_str();
  verb->add_option("--chunk", flags->chunk, "tokens of a sequence in one pass")
      ->check(in_range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  verb->add_option("-o,--output", flags->output, "file to write: tensor `logits`, f32 [tokens, vocab]")
      ->type_name("FILE.safetensors")
      ->required();
  verb->footer("Example:\n  lockstep logits --ids 1,4093 --precision f32 --kv-type f32 -o out.safetensors");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

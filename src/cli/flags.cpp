#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

#include "cli.h"
#include "errors.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {

void ModelFlags::declare(CLI::App& verb, bool with_context) {
  verb.add_option("-m,--model", model,
                  "a .gguf file, a model directory, a hub id org/name in the local cache, or a name "
                  "from `lockstep pull --list`; default: smollm2 (SmolLM2-135M-Instruct)")
      ->type_name("MODEL")
      ->check(not_empty("a model"));
  verb.add_option("-t,--threads", threads, "threads; 0: as many as this machine gives the process")
      ->check(in_range(0, 1024));
  verb.add_option("--precision", precision,
                  "f32: all in f32; exact: 16-bit fixed point where weights are integers; fast: 8 bits where "
                  "that does little harm, bf16 where weights are, attention in 16-bit fixed point")
      ->check(taken_by([](const std::string& name) { parse_precision(name); }))
      ->capture_default_str();
  verb.add_option("--isa", isa,
                  "kernels to use: avx512bf16, avx512, avx2 or scalar (to check, many times slower); "
                  "default: the best here")
      ->check(taken_by([](const std::string& name) { check_isa(name); }));
  if (with_context) {
    verb.add_option("-c,--context", context, "most tokens in the session; 0: the model's own limit")
        ->check(in_range(int64_t{0}, (int64_t{1} << 31) - 1));
  }
  const char* by_precision = kv_type.empty() ? "; default: i16 with --precision fast, else f16" : "";
  verb.add_option(
          "--kv-type", kv_type,
          std::string("element type of the KV cache: f32, f16, i16 (fixed point, summed in integers) or "
                      "q8 (lossy)") +
              by_precision)
      ->check(taken_by([](const std::string& name) { parse_kv_type(name); }))
      ->capture_default_str();
}

void ModelFlags::declare_f32(CLI::App& verb) {
  precision = "f32";
  kv_type = "f32";
  declare(verb, false);
}

ModelOptions ModelFlags::options() const {
  ModelOptions options;
  options.precision = parse_precision(precision);
  options.isa = isa;
  options.threads = threads;
  return options;
}

std::shared_ptr<const Model> ModelFlags::load(Packing packing, const std::string& config_patch) const {
  ModelOptions options = this->options();
  options.config_patch = config_patch;
  options.progress = [](double share) { show_progress("Loading", share); };
  options.packing = packing;
  auto loaded = Model::load(resolve_model(model), options);
  if (context > loaded->info().context) {
    hide_progress();
    std::fprintf(stderr, "lockstep: -c %lld is more than the %lld tokens that the model was made for\n",
                 static_cast<long long>(context), static_cast<long long>(loaded->info().context));
  }
  return loaded;
}

void require_other_file(const std::string& output, const std::filesystem::path& model) {
  namespace fs = std::filesystem;
  std::error_code none;
  bool own = fs::equivalent(model, output, none);
  if (fs::is_directory(model, none)) {
    const fs::path name = fs::path(output).filename();
    own = fs::equivalent(model / name, output, none) &&
          (name.extension() == ".json" || name.string().starts_with("model"));
  }
  if (own)
    throw Error(ErrorCode::invalid_argument,
                "[" + output + "] output: expected another file than the model's");
}

std::shared_ptr<const Model> open_model(const std::filesystem::path& path) {
  ModelOptions options;
  options.packing = Packing::on_use;
  return Model::load(path, options);
}

KvType ModelFlags::kv() const {
  return kv_type.empty() ? default_kv_type(parse_precision(precision)) : parse_kv_type(kv_type);
}

SessionOptions ModelFlags::session_options() const {
  SessionOptions options;
  options.context = context;
  options.kv_type = kv();
  return options;
}

void GenerateFlags::declare(CLI::App& verb) {
  constexpr float kLeast = std::numeric_limits<float>::denorm_min();
  constexpr float kLargest = std::numeric_limits<float>::max();
  SamplingOptions& sampling = options.sampling;
  verb.add_option("-n,--max-tokens", options.max_tokens, "most tokens to generate")
      ->check(in_range(int64_t{0}, int64_t{1} << 31))
      ->capture_default_str();
  verb.add_option("--temp", sampling.temperature, "temperature; 0: always the most likely token")
      ->check(in_range(0.0F, kLargest, "0 or more"))
      ->capture_default_str();
  verb.add_option("--top-k", sampling.top_k, "sample among the k most likely; 0: all")
      ->check(in_range(int64_t{0}, int64_t{1} << 31))
      ->capture_default_str();
  verb.add_option("--top-p", sampling.top_p, "sample among the fewest that reach this probability")
      ->check(in_range(kLeast, 1.0F, "more than 0, at most 1"))
      ->capture_default_str();
  verb.add_option("--min-p", sampling.min_p, "sample among those this many times as likely as the likeliest")
      ->check(in_range(0.0F, 1.0F, "0 to 1"))
      ->capture_default_str();
  verb.add_option("--repeat-penalty", sampling.repeat_penalty,
                  "divide the logits of recent tokens by this; 1: off")
      ->check(in_range(kLeast, kLargest, "more than 0"))
      ->capture_default_str();
  verb.add_option("--seed", sampling.seed, "of the random numbers: equal seed, equal text")
      ->check(in_range(uint64_t{0}, UINT64_MAX))
      ->capture_default_str();
  verb.add_option("--stop", options.stop, "end before this string; may be repeated")->allow_extra_args(false);
}

std::string read_text(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(
      path == "-" ? stdin : std::fopen(path.c_str(), "rb"),
      path == "-" ? [](std::FILE*) { return 0; } : std::fclose);
  std::string text;
  char piece[1 << 16];
  while (file && !std::feof(file.get()) && !std::ferror(file.get()))
    text.append(piece, std::fread(piece, 1, sizeof(piece), file.get()));
  if (file && !std::ferror(file.get())) return text;
  throw Error(file ? ErrorCode::io : ErrorCode::not_found,
              "[" + path + "] read: expected a readable file, got: " + std::strerror(errno));
}

std::vector<int32_t> parse_ids(const std::string& text) {
  std::vector<int32_t> ids;
  const char* at = text.data();
  const char* end = at + text.size();
  const auto skip = [&] {
    while (at < end && std::strchr(" ,[]\n\r\t", *at) != nullptr && *at != '\0') ++at;
  };
  for (skip(); at < end; skip()) {
    int32_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    if (error != std::errc()) {
      const bool large = error == std::errc::result_out_of_range;
      throw Error(ErrorCode::invalid_argument,
                  std::string("[ids] list: expected numbers ") +
                      (large ? "of at most 2147483647" : "divided by commas") + ", got \"" +
                      std::string(at, std::min<size_t>(20, static_cast<size_t>(end - at))) + "\"");
    }
    ids.push_back(id);
    at = next;
  }
  return ids;
}

std::string counted(int64_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

}  // namespace lockstep::cli

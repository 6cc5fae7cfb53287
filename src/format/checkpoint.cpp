#include "lockstep/checkpoint.h"

#include <algorithm>

#include "format/checkpoint_state.h"
#include "format/gguf.h"
#include "format/gguf_view.h"
#include "format/gguf_vocab.h"
#include "format/json.h"
#include "tensor/fail.h"

namespace lockstep {

std::unique_ptr<Checkpoint::State> open_gguf(const std::filesystem::path& path) {
  auto state = std::make_unique<Checkpoint::State>();
  state->format = "gguf";
  state->files.emplace_back(path);
  const std::span<const std::byte> bytes = state->files[0].bytes();
  const std::string where = path.filename().string();
  const auto gguf = std::make_shared<const Gguf>(bytes, where);
  state->architecture = gguf_architecture(*gguf, where);
  state->config.emplace(gguf_config(*gguf, state->architecture, where), where);
  state->tensors = gguf_tensors(*gguf, state->architecture, *state->config, where);
  for (const char* role : {"eos", "eot", "eom"}) {
    const auto id = gguf->integer("tokenizer.ggml." + std::string(role) + "_token_id");
    if (id && *id >= 0 && *id <= INT32_MAX) state->end_ids.push_back(static_cast<int32_t>(*id));
  }
  if (gguf->has("tokenizer.ggml.tokens")) {
    state->make_tokenizer = [gguf] { return Tokenizer::from_gguf(gguf_vocab(*gguf)); };
  }
  return state;
}

Checkpoint::Checkpoint(std::unique_ptr<State> state) : state_(std::move(state)) {}
Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;

Checkpoint Checkpoint::open(const std::filesystem::path& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    fail(ErrorCode::not_found, "[{}] model: expected a .gguf file or a model directory, got nothing there",
         path.string());
  }
  const std::filesystem::path extension = path.extension();
  const bool part = extension == ".safetensors" || extension == ".json";
  const bool directory = std::filesystem::is_directory(status);
  if (!directory && (part || !std::filesystem::is_regular_file(status))) {
    fail(ErrorCode::format, "[{}] model: expected a .gguf file or a model directory, got {}", path.string(),
         part ? "a part of one; name the directory that holds it" : "something that is no file");
  }
  auto state = directory ? open_folder(path) : open_gguf(path);
  state->path = path;
  std::ranges::sort(state->end_ids);
  const auto repeated = std::ranges::unique(state->end_ids);
  state->end_ids.erase(repeated.begin(), repeated.end());
  for (size_t i = 0; i < state->tensors.size(); ++i) {
    const StoredTensor& tensor = state->tensors[i];
    if (!state->index.emplace(tensor.name, i).second) {
      fail(ErrorCode::format, "[{}] tensor table: expected each name once, got {} again", tensor.source,
           tensor.name);
    }
  }
  return Checkpoint(std::move(state));
}

const std::string& Checkpoint::format() const { return state_->format; }
const std::filesystem::path& Checkpoint::path() const { return state_->path; }
const std::string& Checkpoint::architecture() const { return state_->architecture; }
void Checkpoint::patch_config(std::string_view merge_patch) {
  const nlohmann::json original = parse_json(state_->config->json(), state_->config->where());
  nlohmann::json merged = original;
  merged.merge_patch(parse_json(merge_patch, "config patch"));
  const std::string where = state_->config->where();
  // What the format has read, such as quantization, counts as read in the new one too.
  const std::vector<std::string> unread = state_->config->unread();
  state_->config.emplace(merged.dump(), where);
  for (const auto& [key, value] : original.items()) {
    if (std::ranges::find(unread, key) == unread.end()) state_->config->ignore(key);
  }
}

const Config& Checkpoint::config() const { return *state_->config; }
const std::vector<StoredTensor>& Checkpoint::tensors() const { return state_->tensors; }

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const auto it = state_->index.find(name);
  return it == state_->index.end() ? nullptr : &state_->tensors[it->second];
}

std::vector<std::filesystem::path> Checkpoint::weight_files() const {
  std::vector<std::filesystem::path> paths;
  for (const MemoryMap& file : state_->files) paths.push_back(file.path());
  return paths;
}

Tokenizer Checkpoint::tokenizer() const {
  if (!state_->make_tokenizer) {
    fail(ErrorCode::not_found, "[{}] tokenizer: expected one beside the weights, got none", path().string());
  }
  return state_->make_tokenizer();
}

bool Checkpoint::has_tokenizer() const { return static_cast<bool>(state_->make_tokenizer); }
std::vector<int32_t> Checkpoint::end_ids() const { return state_->end_ids; }

const MemoryMap* Checkpoint::State::file_of(std::span<const std::byte> part) const {
  const auto holds = [&](const MemoryMap& file) {
    const std::byte* begin = file.bytes().data();
    return part.data() >= begin && part.data() < begin + file.bytes().size();
  };
  const auto file = std::ranges::find_if(files, holds);
  return file == files.end() ? nullptr : &*file;
}

void Checkpoint::map(std::span<const std::byte> part) const {
  if (const MemoryMap* file = state_->file_of(part)) file->map(part);
}

void Checkpoint::fetch(std::span<const std::byte> part) const {
  if (const MemoryMap* file = state_->file_of(part)) file->fetch(part);
}

void Checkpoint::release(std::span<const std::byte> part) const {
  if (const MemoryMap* file = state_->file_of(part)) file->release(part);
}

}  // namespace lockstep

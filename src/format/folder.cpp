// Hugging Face folders, and those that mlx-lm writes in their image.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "format/checkpoint_state.h"
#include "format/json.h"
#include "format/presence.h"
#include "format/safetensors.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  const MemoryMap file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// Empty if there is no such file.
std::string read_optional(const fs::path& path) { return is_there(path) ? read_file(path) : std::string(); }

// The shards that model.safetensors.index.json names, or the single file.
std::vector<fs::path> weight_paths(const fs::path& folder) {
  const fs::path index = folder / "model.safetensors.index.json";
  if (!is_there(index)) {
    const fs::path single = folder / "model.safetensors";
    if (!is_there(single)) {
      fail(ErrorCode::not_found,
           "[{}] weights: expected model.safetensors or model.safetensors.index.json, got neither",
           folder.string());
    }
    return {single};
  }
  std::set<std::string> names;
  const json table = parse_json(read_file(index), index.string());
  if (!table.is_object() || !table.contains("weight_map") || !table["weight_map"].is_object()) {
    fail(ErrorCode::format, "[{}] weight_map: expected an object of tensors and their files, got none",
         index.string());
  }
  for (const auto& [tensor, shard] : table["weight_map"].items()) {
    if (!shard.is_string()) {
      fail(ErrorCode::format, "[{}] weight_map: expected the file of {}, got {}", index.string(), tensor,
           shard.type_name());
    }
    names.insert(shard.get<std::string>());
  }
  std::vector<fs::path> paths;
  for (const std::string& name : names) {
    // A name, not a way out of the folder.
    if (name.empty() || name.find('/') != std::string::npos || name[0] == '.') {
      fail(ErrorCode::format, "[{}] weight_map: expected file names, got \"{}\"", index.string(), name);
    }
    paths.push_back(folder / name);
    if (!is_there(paths.back())) {
      fail(ErrorCode::not_found, "[{}] weight_map: expected the shard {}, got no such file", index.string(),
           name);
    }
  }
  return paths;
}

// How mlx-lm quantised the folder; bits 0: not at all.
struct Quantisation {
  int64_t bits = 0;
  int64_t group_size = 0;
};

Quantisation read_quantisation(const Config& config) {
  if (const Config* other = config.object("quantization_config");
      other != nullptr && other->has("quant_method")) {
    fail(ErrorCode::unsupported,
         "[{}] quantization_config: expected mlx-lm's affine quantisation or none, got quant_method {}",
         config.where(), other->text("quant_method"));
  }
  const Config* mlx = config.object("quantization");
  if (mlx == nullptr) return {};
  // mlx-lm writes the same object under both names.
  config.ignore("quantization_config");
  if (const Config* twin = config.object("quantization_config")) {
    for (const std::string& key : twin->unread()) twin->ignore(key);
  }
  const Quantisation found{mlx->integer("bits"), mlx->integer("group_size")};
  const std::string mode = mlx->text("mode", "affine");
  if (mode != "affine") {
    fail(ErrorCode::unsupported, "[{}] quantization.mode: expected affine, got {}", config.where(), mode);
  }
  if (found.bits != 4 && found.bits != 8) {
    fail(ErrorCode::unsupported, "[{}] quantization.bits: expected 4 or 8, got {}", config.where(),
         found.bits);
  }
  if (found.group_size != 32 && found.group_size != 64 && found.group_size != 128) {
    fail(ErrorCode::unsupported, "[{}] quantization.group_size: expected 32, 64 or 128, got {}",
         config.where(), found.group_size);
  }
  if (const auto unread = mlx->unread(); !unread.empty()) {
    fail(ErrorCode::unsupported, "[{}] quantization: expected one setting for all layers, got another for {}",
         config.where(), unread[0]);
  }
  return found;
}

// Joins the codes, scales and biases of mlx into one tensor.
StoredTensor join_mlx(const StoredTensor& codes, const StoredTensor* scales, const StoredTensor* biases,
                      const Quantisation& quantisation) {
  StoredTensor joined = codes;
  joined.dtype = quantisation.bits == 4 ? DType::mlx_q4 : DType::mlx_q8;
  joined.group_size = quantisation.group_size;
  joined.shape[-1] = codes.shape[-1] * 32 / quantisation.bits;
  Shape groups = joined.shape;
  groups[-1] = joined.shape[-1] / quantisation.group_size;
  if (joined.shape[-1] % quantisation.group_size != 0) {
    fail(ErrorCode::format, "[{}] width: expected whole groups of {}, got {} columns", codes.source,
         quantisation.group_size, joined.shape[-1]);
  }
  for (const StoredTensor* part : {scales, biases}) {
    const bool fits =
        part != nullptr && part->shape == groups &&
        (part->dtype == DType::f16 || part->dtype == DType::bf16 || part->dtype == DType::f32) &&
        part->dtype == scales->dtype;
    if (!fits) {
      fail(ErrorCode::format, "[{}] scales and biases: expected floats of shape {} beside the codes, got {}",
           codes.source, groups.str(), part == nullptr ? "none" : part->shape.str());
    }
  }
  joined.scale_dtype = scales->dtype;
  joined.scales = scales->data;
  joined.biases = biases->data;
  return joined;
}

std::vector<StoredTensor> join_all_mlx(const std::vector<StoredTensor>& stored,
                                       const Quantisation& quantisation) {
  std::map<std::string_view, const StoredTensor*> by_name;
  for (const StoredTensor& tensor : stored) by_name[tensor.name] = &tensor;
  const auto find = [&](const std::string& name) {
    const auto it = by_name.find(name);
    return it == by_name.end() ? nullptr : it->second;
  };
  constexpr std::string_view kWeight = ".weight";
  std::vector<StoredTensor> joined;
  std::set<std::string> parts;  // names that are part of another
  for (const StoredTensor& tensor : stored) {
    if (tensor.dtype != DType::u32 || !tensor.name.ends_with(kWeight) || tensor.shape.rank() < 2) continue;
    const std::string base = tensor.name.substr(0, tensor.name.size() - kWeight.size());
    joined.push_back(join_mlx(tensor, find(base + ".scales"), find(base + ".biases"), quantisation));
    parts.insert({tensor.name, base + ".scales", base + ".biases"});
  }
  for (const StoredTensor& tensor : stored) {
    if (!parts.contains(tensor.name)) joined.push_back(tensor);
  }
  return joined;
}

// eos_token_id of a config, a number or a list.
void add_end_ids(const Config& config, std::vector<int32_t>& ids) {
  for (int64_t id : config.integers("eos_token_id")) {
    if (id >= 0 && id <= INT32_MAX) ids.push_back(static_cast<int32_t>(id));
  }
}

Tokenizer make_tokenizer(const fs::path& folder) {
  const std::string json = read_file(folder / "tokenizer.json");
  const std::string config = read_optional(folder / "tokenizer_config.json");
  const std::string jinja = read_optional(folder / "chat_template.jinja");
  const std::string chat = read_optional(folder / "chat_template.json");
  return Tokenizer::from_files({json, config, jinja, chat});
}

}  // namespace

std::unique_ptr<Checkpoint::State> open_folder(const fs::path& path) {
  auto state = std::make_unique<Checkpoint::State>();
  const fs::path config_path = path / "config.json";
  if (!is_there(config_path)) {
    fail(ErrorCode::not_found, "[{}] config.json: expected one in a model directory, got none",
         path.string());
  }
  state->config.emplace(read_file(config_path), config_path.string());
  const Config& config = *state->config;
  state->architecture = config.text("model_type");
  const Quantisation quantisation = read_quantisation(config);

  std::vector<StoredTensor> tensors;
  bool written_by_mlx = quantisation.bits > 0;
  for (const fs::path& file : weight_paths(path)) {
    const MemoryMap& map = state->files.emplace_back(file);
    const std::string where = file.filename().string();
    SafeTensors contents = read_safetensors(map.bytes(), where);
    written_by_mlx = written_by_mlx || contents.metadata["format"] == "mlx";
    for (SafeTensor& each : contents.tensors) {
      StoredTensor tensor;
      tensor.name = each.name;
      tensor.source = where + ": " + each.name;
      tensor.dtype = each.dtype;
      tensor.shape = each.shape;
      tensor.data = each.data;
      tensors.push_back(std::move(tensor));
    }
  }
  state->format = written_by_mlx ? "mlx" : "safetensors";
  state->tensors = quantisation.bits > 0 ? join_all_mlx(tensors, quantisation) : std::move(tensors);
  add_end_ids(config, state->end_ids);
  if (const fs::path generation = path / "generation_config.json"; is_there(generation)) {
    add_end_ids(Config(read_file(generation), generation.string()), state->end_ids);
  }
  if (is_there(path / "tokenizer.json")) state->make_tokenizer = [path] { return make_tokenizer(path); };
  return state;
}

}  // namespace lockstep

#include "cli/bad_files.h"

#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "support/fixtures.h"

namespace lockstep::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no " + path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

template <typename T>
void put(std::string& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

size_t find(const std::string& bytes, const std::string& text) {
  const size_t at = bytes.find(text);
  if (at == std::string::npos) throw std::runtime_error("the fixture has no " + text);
  return at;
}

// Where the description of a GGUF tensor goes on after its name: rank, extents, type, offset.
size_t after_name(const std::string& gguf, const std::string& tensor) {
  std::string key(8, '\0');
  put(key, 0, static_cast<uint64_t>(tensor.size()));
  return find(gguf, key + tensor) + 8 + tensor.size();
}

// A copy of a fixture's folder whose config is edited.
void edited_config(const fs::path& folder, const std::string& name, const std::string& source,
                   const std::function<void(json&)>& edit) {
  fs::copy(data_path("models/" + source), folder / name);
  json config = json::parse(read(folder / name / "config.json"));
  edit(config);
  write(folder / name / "config.json", config.dump());
}

// A copy of a folder whose safetensors header is edited; the data stay as they are.
void edited_header(const fs::path& folder, const std::string& name, const std::function<void(json&)>& edit) {
  fs::copy(data_path("models/llama"), folder / name);
  const std::string bytes = read(folder / name / "model.safetensors");
  uint64_t size = 0;
  std::memcpy(&size, bytes.data(), 8);
  json header = json::parse(bytes.substr(8, size));
  edit(header);
  const std::string text = header.dump();
  std::string head(8, '\0');
  put(head, 0, static_cast<uint64_t>(text.size()));
  write(folder / name / "model.safetensors", head + text + bytes.substr(8 + size));
}

void make_gguf_files(const fs::path& folder) {
  const std::string good = read(data_path("models/llama.gguf"));
  const auto make = [&](const char* name, const std::function<void(std::string&)>& edit) {
    std::string bytes = good;
    edit(bytes);
    write(folder / name, bytes);
  };
  make("tiny.gguf", [](std::string&) {});
  make("empty.gguf", [](std::string& b) { b.clear(); });
  make("magic.gguf", [](std::string& b) { b[0] = 'X'; });
  make("version.gguf", [](std::string& b) { put(b, 4, uint32_t{1}); });
  make("cut-header.gguf", [](std::string& b) { b.resize(700); });
  make("cut-data.gguf", [](std::string& b) { b.resize(b.size() - 5000); });
  make("many-tensors.gguf", [](std::string& b) { put(b, 8, uint64_t{1} << 60); });
  make("many-keys.gguf", [](std::string& b) { put(b, 16, uint64_t{1} << 60); });
  make("long-string.gguf", [](std::string& b) { put(b, 24, uint64_t{1} << 62); });
  const std::string tensor = "blk.0.attn_q.weight";
  make("huge-tensor.gguf", [&](std::string& b) { put(b, after_name(b, tensor) + 4, uint64_t{1} << 50); });
  make("no-rows.gguf", [&](std::string& b) { put(b, after_name(b, tensor) + 12, uint64_t{0}); });
  make("type.gguf", [&](std::string& b) { put(b, after_name(b, tensor) + 20, uint32_t{19}); });
  make("rank.gguf", [&](std::string& b) { put(b, after_name(b, tensor), uint32_t{9}); });
  make("twice.gguf", [&](std::string& b) { b[find(b, "blk.1.attn_q.weight") + 4] = '0'; });
  make("overlap.gguf", [&](std::string& b) { put(b, after_name(b, tensor) + 24, uint64_t{0}); });
  make("architecture.gguf", [](std::string& b) {
    // Every "llama" of the metadata, keys included, so that only the name is new.
    for (size_t at = 0; (at = b.find("llama", at)) != std::string::npos; ++at) b.replace(at, 5, "bloom");
  });
  make("missing-tensor.gguf",
       [&](std::string& b) { b.replace(find(b, tensor), tensor.size(), "blk.7.attn_q.weight"); });
}

void make_folders(const fs::path& folder) {
  fs::create_directory(folder / "nothing");
  edited_config(folder, "architecture", "llama", [](json& c) { c["model_type"] = "gpt_neox"; });
  edited_config(folder, "softcap", "llama", [](json& c) { c["attn_logit_softcapping"] = 50.0; });
  edited_config(folder, "scaling", "llama", [](json& c) {
    c["rope_parameters"] = {{"rope_type", "longrope"}, {"rope_theta", 1e4}, {"short_factor", {1.0}}};
  });
  edited_config(folder, "wrong-type", "llama", [](json& c) { c["num_hidden_layers"] = "two"; });
  edited_config(folder, "no-layers", "llama", [](json& c) { c.erase("num_hidden_layers"); });
  edited_config(folder, "heads", "llama", [](json& c) { c["num_key_value_heads"] = 4; });
  edited_config(folder, "misshapen", "llama", [](json& c) { c["intermediate_size"] = 64; });
  edited_config(folder, "surplus", "llama", [](json& c) { c["num_hidden_layers"] = 1; });
  edited_config(folder, "missing", "llama", [](json& c) { c["num_hidden_layers"] = 3; });
  edited_config(folder, "broken-config", "llama", [](json&) {});
  write(folder / "broken-config/config.json", "{\"model_type\": \"llama\",");
  edited_config(folder, "mlx-mode", "llama-mlx-4bit", [](json& c) { c["quantization"]["mode"] = "mxfp4"; });
  edited_config(folder, "mlx-mixed", "llama-mlx-4bit", [](json& c) {
    c["quantization"]["model.layers.0.mlp.down_proj"] = {{"bits", 8}, {"group_size", 64}};
  });
  edited_config(folder, "mlx-bits", "llama-mlx-4bit", [](json& c) { c["quantization"]["bits"] = 3; });
  edited_config(folder, "awq", "llama",
                [](json& c) { c["quantization_config"] = {{"quant_method", "awq"}}; });
  edited_config(folder, "context", "llama-text", [](json& c) { c["max_position_embeddings"] = 0; });
  edited_config(folder, "no-weights", "llama", [](json&) {});
  fs::remove(folder / "no-weights/model.safetensors");
  edited_config(folder, "weight-map", "mistral", [](json&) {});
  write(folder / "weight-map/model.safetensors.index.json", "{\"weight_map\": {\"model.norm.weight\": 3}}");
  edited_config(folder, "tokenizer", "llama-text", [](json&) {});
  write(folder / "tokenizer/tokenizer.json", "{}");
  edited_config(folder, "template", "llama-text", [](json&) {});
  write(folder / "template/chat_template.jinja", "{% for message %}");
  edited_config(folder, "refusing", "llama-text", [](json&) {});
  write(folder / "refusing/chat_template.jinja", "{{ raise_exception('expected a system message') }}");
  edited_config(folder, "missing-shard", "mistral", [](json&) {});
  fs::remove(folder / "missing-shard/model-00002-of-00003.safetensors");
  edited_config(folder, "outside", "mistral", [](json&) {});
  json index = json::parse(read(folder / "outside/model.safetensors.index.json"));
  index["weight_map"]["model.norm.weight"] = "../other/model.safetensors";
  write(folder / "outside/model.safetensors.index.json", index.dump());
  edited_config(folder, "long-header", "llama", [](json&) {});
  std::string bytes = read(folder / "long-header/model.safetensors");
  put(bytes, 0, uint64_t{1} << 40);
  write(folder / "long-header/model.safetensors", bytes);
  edited_config(folder, "header", "llama", [](json&) {});
  bytes.replace(8, 1, "[");
  put(bytes, 0, uint64_t{100});
  write(folder / "header/model.safetensors", bytes);
  edited_header(folder, "no-offsets", [](json& h) { h["model.norm.weight"].erase("data_offsets"); });
  edited_header(folder, "float8", [](json& h) { h["model.norm.weight"]["dtype"] = "F8_E4M3"; });
  // A name that would clear the terminal and pretend to be a second message.
  edited_header(folder, "terminal", [](json& h) {
    h["x\x1b[2J\nlockstep: done"] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  edited_header(folder, "empty-tensor", [](json& h) {  // behind the last of the data, as it may be
    h["a"] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {176448, 176448}}};
  });
  edited_header(folder, "outside-data",
                [](json& h) { h["model.norm.weight"]["data_offsets"] = {1000000, 1000192}; });
  edited_header(folder, "overlapping", [](json& h) {
    h["model.norm.weight"]["data_offsets"] = h["model.layers.0.input_layernorm.weight"]["data_offsets"];
  });
}

}  // namespace

void make_bad_files(const fs::path& folder) {
  make_gguf_files(folder);
  make_folders(folder);
  fs::copy(data_path("models/llama-text"), folder / "text");
  write(folder / "latin1.txt", "caf\xE9");
  write(folder / "empty.txt", "");
  if (::mkfifo((folder / "pipe.gguf").c_str(), 0600) != 0) throw std::runtime_error("mkfifo");
}

}  // namespace lockstep::test

#include "format/gguf_view.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "tensor/fail.h"

namespace lockstep {
namespace {

using nlohmann::json;

// What llama.cpp's converter does to the tensors of an architecture.
struct Conversion {
  std::string_view architecture;
  bool interleaves_rope;  // rows of Q and K are reordered within each head
  bool optional_bias;     // whether Q, K, V and O have biases is a key of the config
};
constexpr std::array<Conversion, 3> kConversions = {{
    {"llama", true, true},
    {"mixtral", true, false},
    {"qwen2", false, false},
}};

// An architecture that is not listed is converted as it is.
Conversion conversion_of(const std::string& architecture) {
  for (const Conversion& each : kConversions) {
    if (each.architecture == architecture) return each;
  }
  return {architecture, false, false};
}

// Metadata keys, after the architecture's prefix, and the config keys that say the same.
constexpr std::array<std::array<std::string_view, 2>, 13> kKeys = {{
    {"block_count", "num_hidden_layers"},
    {"embedding_length", "hidden_size"},
    {"feed_forward_length", "intermediate_size"},
    {"attention.head_count", "num_attention_heads"},
    {"attention.head_count_kv", "num_key_value_heads"},
    {"attention.key_length", "head_dim"},
    {"attention.layer_norm_rms_epsilon", "rms_norm_eps"},
    {"attention.sliding_window", "sliding_window"},
    {"context_length", "max_position_embeddings"},
    {"expert_count", "num_local_experts"},
    {"expert_used_count", "num_experts_per_tok"},
    {"rope.freq_base", "rope_theta"},
    {"vocab_size", "vocab_size"},
}};

constexpr std::array<std::array<std::string_view, 2>, 5> kScalingKeys = {{
    {"rope.scaling.type", "rope_type"},
    {"rope.scaling.factor", "factor"},
    {"rope.scaling.original_context_length", "original_max_position_embeddings"},
    {"rope.scaling.yarn_beta_fast", "beta_fast"},
    {"rope.scaling.yarn_beta_slow", "beta_slow"},
}};

// Within "blk.N.": llama.cpp's name and Hugging Face's within "model.layers.N.".
constexpr std::array<std::array<std::string_view, 2>, 13> kLayerTensors = {{
    {"attn_norm", "input_layernorm"},
    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"},
    {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},
    {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
    {"ffn_gate_inp", "block_sparse_moe.gate"},
    {"ffn_gate_exps", "block_sparse_moe.switch_mlp.gate_proj"},
    {"ffn_up_exps", "block_sparse_moe.switch_mlp.up_proj"},
    {"ffn_down_exps", "block_sparse_moe.switch_mlp.down_proj"},
}};

constexpr std::array<std::array<std::string_view, 2>, 3> kExpertTensors = {{
    {"ffn_gate", "w1"},
    {"ffn_down", "w2"},
    {"ffn_up", "w3"},
}};

json as_json(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> json {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::string_view>) {
          return std::string(v);
        } else if constexpr (std::is_same_v<T, std::vector<std::string_view>>) {
          json list = json::array();
          for (std::string_view each : v) list.push_back(std::string(each));
          return list;
        } else {
          return json(v);
        }
      },
      value);
}

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; empty if unknown.
std::string layer_name(std::string_view name) {
  name.remove_prefix(4);
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos) return {};
  const std::string prefix = "model.layers." + std::string(name.substr(0, dot)) + ".";
  std::string_view rest = name.substr(dot + 1);
  const size_t last = rest.rfind('.');
  if (last == std::string_view::npos) return {};
  const std::string suffix(rest.substr(last));  // ".weight" or ".bias"
  rest = rest.substr(0, last);
  for (const auto& [theirs, ours] : kLayerTensors) {
    if (rest == theirs) return prefix + std::string(ours) + suffix;
  }
  // Older files hold experts one by one: "ffn_gate.2".
  const size_t expert = rest.rfind('.');
  if (expert == std::string_view::npos) return {};
  for (const auto& [theirs, ours] : kExpertTensors) {
    if (rest.substr(0, expert) == theirs) {
      return prefix + "block_sparse_moe.experts." + std::string(rest.substr(expert + 1)) + "." +
             std::string(ours) + suffix;
    }
  }
  return {};
}

std::string hugging_face_name(std::string_view name) {
  if (name == "token_embd.weight") return "model.embed_tokens.weight";
  if (name == "output.weight") return "lm_head.weight";
  if (name == "output_norm.weight") return "model.norm.weight";
  std::string translated;
  if (name.starts_with("blk.")) translated = layer_name(name);
  return translated.empty() ? std::string(name) : translated;
}

// Tied embeddings, biases and the vocabulary are not metadata: the tensors tell.
void add_what_tensors_tell(const Gguf& gguf, const Conversion& conversion, json& config) {
  bool head = false;
  bool bias = false;
  for (const GgufTensor& tensor : gguf.tensors()) {
    head = head || tensor.name == "output.weight";
    bias = bias || tensor.name == "blk.0.attn_q.bias";
    if (tensor.name == "token_embd.weight" && tensor.shape.rank() == 2) {
      config["vocab_size"] = tensor.shape[0];
    }
  }
  config["tie_word_embeddings"] = !head;
  if (bias && conversion.optional_bias) config["attention_bias"] = true;
}

}  // namespace

std::string gguf_architecture(const Gguf& gguf, const std::string& where) {
  const auto name = gguf.text("general.architecture");
  if (!name) {
    fail(ErrorCode::format, "[{}] general.architecture: expected a name, got none", where);
  }
  const auto experts = gguf.integer(std::string(*name) + ".expert_count");
  if (*name == "llama" && experts.value_or(0) > 0) return "mixtral";
  return std::string(*name);
}

std::string gguf_config(const Gguf& gguf, const std::string& architecture, const std::string& where) {
  const std::string prefix = std::string(*gguf.text("general.architecture")) + ".";
  json config = {{"model_type", architecture}};
  json scaling = json::object();
  for (const auto& [key, value] : gguf.metadata()) {
    if (!key.starts_with(prefix)) continue;
    const std::string_view name = key.substr(prefix.size());
    std::string_view translated;
    for (const auto& [theirs, ours] : kKeys) {
      if (name == theirs) translated = ours;
    }
    if (!translated.empty()) {
      config[std::string(translated)] = as_json(value);
      continue;
    }
    for (const auto& [theirs, ours] : kScalingKeys) {
      if (name == theirs) translated = ours;
    }
    if (!translated.empty()) {
      scaling[std::string(translated)] = as_json(value);
      continue;
    }
    config["gguf:" + std::string(name)] = as_json(value);
  }
  const json type = scaling.value("rope_type", json("none"));
  if (type != "none") {
    config["rope_scaling"] = scaling;
  } else if (scaling.contains("factor") && scaling["factor"] != 1.0) {
    fail(ErrorCode::unsupported, "[{}] rope.scaling.type: expected a type beside the factor, got none",
         where);
  }
  add_what_tensors_tell(gguf, conversion_of(architecture), config);
  // A value head of another size than the key head, or a partial rotation, is another architecture.
  const auto drop_if_equal = [&](const char* key, const json& expected) {
    if (config.contains(key) && config[key] == expected) config.erase(key);
  };
  const json hidden = config.value("hidden_size", json(0));
  const json heads = config.value("num_attention_heads", json(1));
  json head_dim = config.value("head_dim", json());
  if (head_dim.is_null() && hidden.is_number_integer() && heads.is_number_integer() && heads > 0) {
    head_dim = hidden.get<int64_t>() / heads.get<int64_t>();
  }
  drop_if_equal("gguf:attention.value_length", head_dim);
  drop_if_equal("gguf:rope.dimension_count", head_dim);
  drop_if_equal("gguf:rope.scaling.attn_factor", 1.0);
  // A dense model may say that it has no experts.
  drop_if_equal("num_local_experts", 0);
  drop_if_equal("num_experts_per_tok", 0);
  for (const char* harmless :
       {"gguf:attention.causal", "gguf:rope.scaling.finetuned", "gguf:tensor_data_layout"})
    config.erase(harmless);
  return config.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::vector<StoredTensor> gguf_tensors(const Gguf& gguf, const std::string& architecture,
                                       const Config& config, const std::string& where) {
  const bool interleaves = conversion_of(architecture).interleaves_rope;
  const int64_t heads = config.integer("num_attention_heads", 0);
  const int64_t kv_heads = config.integer("num_key_value_heads", heads);
  std::vector<StoredTensor> tensors;
  for (const GgufTensor& stored : gguf.tensors()) {
    StoredTensor tensor;
    tensor.name = hugging_face_name(stored.name);
    tensor.source = where + ": " + std::string(stored.name);
    tensor.dtype = stored.dtype;
    tensor.shape = stored.shape;
    tensor.data = stored.data;
    const bool query = tensor.name.find(".self_attn.q_proj.") != std::string::npos;
    const bool key = tensor.name.find(".self_attn.k_proj.") != std::string::npos;
    if (interleaves && (query || key)) {
      const int64_t count = query ? heads : kv_heads;
      // The permutation works on whole pairs of rows within a head.
      if (count < 1 || tensor.shape[0] % count != 0 || tensor.shape[0] / count % 2 != 0) {
        fail(ErrorCode::format, "[{}] shape: expected rows for {} heads of even size, got {}", tensor.source,
             count, tensor.shape.str());
      }
      tensor.interleaved_heads = count;
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

}  // namespace lockstep

#include "models/config_keys.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// Written by transformers, mlx-lm and training tools; none of them reaches the forward pass.
constexpr std::array<std::string_view, 31> kHarmless = {"_name_or_path",
                                                        "architectures",
                                                        "attention_dropout",
                                                        "attn_implementation",
                                                        "auto_map",
                                                        "bos_token_id",
                                                        "chunk_size_feed_forward",
                                                        "dtype",
                                                        "eos_token_id",
                                                        "id2label",
                                                        "initializer_range",
                                                        "is_decoder",
                                                        "is_encoder_decoder",
                                                        "is_llama_config",
                                                        "label2id",
                                                        "max_length",
                                                        "max_position_embeddings",
                                                        "model_type",
                                                        "output_attentions",
                                                        "output_hidden_states",
                                                        "output_router_logits",
                                                        "pad_token_id",
                                                        "pretraining_tp",
                                                        "return_dict",
                                                        "router_aux_loss_coef",
                                                        "router_jitter_noise",
                                                        "tokenizer_class",
                                                        "torch_dtype",
                                                        "transformers_version",
                                                        "unsloth_version",
                                                        "use_cache"};

// Switches of other architectures, written by some although they are off.
constexpr std::array<std::string_view, 7> kHarmlessIfFalse = {"attention_bias",    "mlp_bias",  "qkv_bias",
                                                              "rope_interleaved",  "use_mrope", "use_qk_norm",
                                                              "use_sliding_window"};

// Words in the names of keys that change the maths in some architecture.
constexpr std::array<std::string_view, 17> kMaths = {
    "rope", "rotary",    "scal", "window", "cap",        "bias",  "norm", "quantiz", "expert",
    "act",  "attention", "head", "layer",  "multiplier", "theta", "moe",  "router"};

}  // namespace

std::vector<std::string> check_unread_keys(const Config& config) {
  std::vector<std::string> unread;
  for (const std::string& key : config.unread()) {
    if (std::ranges::find(kHarmless, key) != kHarmless.end()) continue;
    if (std::ranges::find(kHarmlessIfFalse, key) != kHarmlessIfFalse.end() && !config.boolean(key)) continue;
    for (std::string_view word : kMaths) {
      if (key.find(word) == std::string::npos) continue;
      fail(ErrorCode::unsupported,
           "[{}] {}: expected only keys that lockstep computes with, got one that may change the "
           "result",
           config.where(), key);
    }
    unread.push_back(key);
  }
  return unread;
}

}  // namespace lockstep

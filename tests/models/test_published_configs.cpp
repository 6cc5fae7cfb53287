// Keys that published config.json files hold beside those of the fixtures.
#include <gtest/gtest.h>

#include <string>

#include "lockstep/error.h"
#include "lockstep/model.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

void load(const std::string& model, const std::string& patch) {
  ModelOptions options;
  options.config_patch = patch;
  Model::load(test::data_path("models/" + model), options);
}

TEST(PublishedConfigs, AreRead) {
  // SmolLM2-135M-Instruct; Llama 2 and 3.1; Mistral 7B v0.3; Mixtral 8x7B; Qwen2.5.
  EXPECT_NO_THROW(load("llama", R"({"is_llama_config": true, "rope_interleaved": false, "rope_scaling": null,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}})"));
  EXPECT_NO_THROW(load(
      "llama", R"({"_name_or_path": "x", "pretraining_tp": 1, "torch_dtype": "float16", "use_cache": true,
    "rope_scaling": null, "eos_token_id": [128001, 128008, 128009], "attention_bias": false, "mlp_bias": false})"));
  EXPECT_NO_THROW(load("mistral", R"({"sliding_window": null, "attention_dropout": 0.0})"));
  EXPECT_NO_THROW(load(
      "mixtral", R"({"output_router_logits": false, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0,
    "attention_bias": false})"));
  EXPECT_NO_THROW(
      load("qwen2", R"({"use_sliding_window": false, "max_window_layers": 21, "sliding_window": 131072,
    "use_mrope": false})"));
}

TEST(PublishedConfigs, WhatChangesTheMathsIsRefused) {
  EXPECT_THROW(load("llama", R"({"rope_interleaved": true})"), Error);
  EXPECT_THROW(load("qwen2", R"({"use_mrope": true})"), Error);
  EXPECT_THROW(load("llama", R"({"final_logit_softcapping": 30.0})"), Error);
  EXPECT_THROW(load("mixtral", R"({"norm_topk_prob": false})"), Error);
  EXPECT_THROW(load("llama", R"({"quantization_config": {"quant_method": "gptq"}})"), Error);
  EXPECT_THROW(load("llama", R"({"hidden_act": "gelu"})"), Error);
  EXPECT_THROW(load("llama", R"({"rms_norm_eps": -1e-5})"), Error);
}

// Before the weights that a config speaks of are looked for, it cannot ask for much memory.
TEST(PublishedConfigs, HugeSizesAreRefusedAtOnce) {
  for (const char* model : {"llama", "mistral", "mixtral", "qwen2", "qwen2-window"}) {
    EXPECT_THROW(load(model, R"({"num_hidden_layers": 1073741824})"), Error) << model;
    EXPECT_THROW(load(model, R"({"num_hidden_layers": 0})"), Error) << model;
    EXPECT_THROW(load(model, R"({"num_attention_heads": 0})"), Error) << model;
  }
}

}  // namespace
}  // namespace lockstep

// A model of a few thousand weights, and what is done with whatever loads.
#pragma once

#include "fuzz/support.h"

namespace lockstep::fuzz {

/// Of a Llama with one layer and both q_proj and o_proj biased, so that every kind of tensor occurs.
inline constexpr std::string_view kTinyConfig =
    R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 8, "max_position_embeddings": 64})";

/// Its weights, as one safetensors file.
void write_tiny_weights(const std::filesystem::path& path);

/// Loads a model, and if that succeeds runs it on two tokens.
void load_and_run(const std::filesystem::path& path);

}  // namespace lockstep::fuzz

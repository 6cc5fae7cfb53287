#include "fuzz/tiny_model.h"

#include <vector>

#include "lockstep/checkpoint.h"
#include "lockstep/model.h"
#include "lockstep/session.h"

namespace lockstep::fuzz {

void write_tiny_weights(const std::filesystem::path& path) {
  const std::string layer = "model.layers.0.";
  const std::vector<std::pair<std::string, Shape>> shapes = {
      {"model.embed_tokens.weight", {8, 32}},
      {"model.norm.weight", {32}},
      {"lm_head.weight", {8, 32}},
      {layer + "input_layernorm.weight", {32}},
      {layer + "post_attention_layernorm.weight", {32}},
      {layer + "self_attn.q_proj.weight", {32, 32}},
      {layer + "self_attn.k_proj.weight", {16, 32}},
      {layer + "self_attn.v_proj.weight", {16, 32}},
      {layer + "self_attn.o_proj.weight", {32, 32}},
      {layer + "mlp.gate_proj.weight", {32, 32}},
      {layer + "mlp.up_proj.weight", {32, 32}},
      {layer + "mlp.down_proj.weight", {32, 32}},
  };
  std::vector<NamedTensor> tensors;
  const std::vector<std::byte> ones(32 * 32 * 2, std::byte{0x3c});  // f16: 1.06
  for (const auto& [name, shape] : shapes) {
    tensors.push_back(
        {name, DType::f16, shape, std::span(ones).first(static_cast<size_t>(shape.size()) * 2)});
  }
  save_tensors(path, tensors);
}

void load_and_run(const std::filesystem::path& path) {
  ModelOptions options;
  options.threads = 1;
  options.precision = Precision::f32;  // weights may be infinite, for which fixed point has no codes
  const std::shared_ptr<const Model> model = Model::load(path, options);
  Session session(model, {.context = 4});
  const int32_t ids[] = {0, 1};
  require(session.sync(ids).size() == model->info().vocab);
}

}  // namespace lockstep::fuzz

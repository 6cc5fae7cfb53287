#include "format/gguf_vocab.h"

#include <string>

namespace lockstep {

GgufVocab gguf_vocab(const Gguf& gguf) {
  const auto key = [](std::string_view name) { return "tokenizer.ggml." + std::string(name); };
  const auto id = [&](std::string_view role) {
    const int64_t value = gguf.integer(key(std::string(role) + "_token_id")).value_or(-1);
    return value < 0 || value > INT32_MAX ? -1 : static_cast<int32_t>(value);
  };
  GgufVocab vocab;
  vocab.model = gguf.text(key("model")).value_or("");
  vocab.pre = gguf.text(key("pre")).value_or("");
  vocab.tokens = gguf.texts(key("tokens"));
  for (double score : gguf.numbers(key("scores"))) vocab.scores.push_back(static_cast<float>(score));
  for (int64_t type : gguf.integers(key("token_type"))) vocab.types.push_back(static_cast<int32_t>(type));
  vocab.merges = gguf.texts(key("merges"));
  vocab.bos = id("bos");
  vocab.eos = id("eos");
  vocab.unk = id("unknown");
  vocab.pad = id("padding");
  vocab.add_bos = gguf.boolean(key("add_bos_token"));
  vocab.add_eos = gguf.boolean(key("add_eos_token"));
  vocab.add_space_prefix = gguf.boolean(key("add_space_prefix"));
  vocab.chat_template = gguf.text("tokenizer.chat_template").value_or("");
  vocab.tool_use_template = gguf.text("tokenizer.chat_template.tool_use").value_or("");
  return vocab;
}

}  // namespace lockstep

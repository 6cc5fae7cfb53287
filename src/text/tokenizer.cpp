#include "lockstep/text.h"

#include "text/ffi.h"
#include "text/state.h"

namespace lockstep {
namespace {

std::vector<lst_text> views(std::span<const std::string_view> texts) {
  std::vector<lst_text> result;
  result.reserve(texts.size());
  for (std::string_view each : texts) result.push_back(text::view(each));
  return result;
}

int8_t flag(const std::optional<bool>& value) { return value ? static_cast<int8_t>(*value) : int8_t{-1}; }

std::optional<int32_t> if_present(int32_t id) { return id < 0 ? std::nullopt : std::optional(id); }

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}

Tokenizer Tokenizer::from_files(const TokenizerFiles& files) {
  lst_tokenizer* handle = nullptr;
  text::call([&](lst_buffer* error) {
    return lst_tokenizer_from_json(text::view(files.tokenizer_json), text::view(files.tokenizer_config_json),
                                   text::view(files.chat_template_jinja),
                                   text::view(files.chat_template_json), &handle, error);
  });
  return Tokenizer(std::make_shared<State>(text::TokenizerHandle(handle), lst_tokenizer_info(handle)));
}

Tokenizer Tokenizer::from_gguf(const GgufVocab& vocab) {
  const std::vector<lst_text> tokens = views(vocab.tokens);
  const std::vector<lst_text> merges = views(vocab.merges);
  lst_gguf_vocab raw{};
  raw.model = text::view(vocab.model);
  raw.pre = text::view(vocab.pre);
  raw.tokens = tokens.data();
  raw.token_count = tokens.size();
  raw.scores = vocab.scores.data();
  raw.score_count = vocab.scores.size();
  raw.types = vocab.types.data();
  raw.type_count = vocab.types.size();
  raw.merges = merges.data();
  raw.merge_count = merges.size();
  raw.bos = vocab.bos;
  raw.eos = vocab.eos;
  raw.unk = vocab.unk;
  raw.pad = vocab.pad;
  raw.add_bos = flag(vocab.add_bos);
  raw.add_eos = flag(vocab.add_eos);
  raw.add_space_prefix = flag(vocab.add_space_prefix);
  raw.chat_template = text::view(vocab.chat_template);
  raw.tool_use_template = text::view(vocab.tool_use_template);
  lst_tokenizer* handle = nullptr;
  text::call([&](lst_buffer* error) { return lst_tokenizer_from_gguf(&raw, &handle, error); });
  return Tokenizer(std::make_shared<State>(text::TokenizerHandle(handle), lst_tokenizer_info(handle)));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  lst_ids ids{};
  const std::unique_ptr<lst_ids, text::Free<lst_ids_free>> owner(&ids);
  text::call([&](lst_buffer* error) {
    return lst_encode(state_->handle.get(), text::view(text), add_special ? 1 : 0, 1, &ids, error);
  });
  return {ids.data, ids.data + ids.size};
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  text::Buffer out;
  text::call([&](lst_buffer* error) {
    return lst_decode(state_->handle.get(), ids.data(), ids.size(), skip_special ? 1 : 0, out.out(), error);
  });
  return out.str();
}

int64_t Tokenizer::vocab_size() const { return state_->info.vocab_size; }

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  return if_present(lst_token_to_id(state_->handle.get(), text::view(token)));
}

std::optional<int32_t> Tokenizer::bos() const { return if_present(state_->info.bos); }
std::optional<int32_t> Tokenizer::eos() const { return if_present(state_->info.eos); }

std::optional<std::string> Tokenizer::chat_template() const {
  const lst_text source = lst_tokenizer_template(state_->handle.get());
  if (source.size == 0) return std::nullopt;
  return std::string(source.data, source.size);
}

}  // namespace lockstep

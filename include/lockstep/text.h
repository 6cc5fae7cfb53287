// From text to tokens and back: tokenizers, chat templates, and text that arrives token by token.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

/// What a GGUF's metadata says about its tokenizer, under the names of the keys without
/// "tokenizer.ggml." (vocabulary: `tokens`, one entry an id). Absent numbers are -1.
struct GgufVocab {
  std::string_view model;                ///< "gpt2" (byte-level BPE) or "llama" (SentencePiece)
  std::string_view pre;                  ///< pre-tokenizer of byte-level BPE, e.g. "qwen2"
  std::vector<std::string_view> tokens;  ///< [vocab]
  std::vector<float> scores;             ///< [vocab] or empty
  std::vector<int32_t> types;            ///< [vocab] or empty: ggml's token types
  std::vector<std::string_view> merges;
  int32_t bos = -1, eos = -1, unk = -1, pad = -1;
  std::optional<bool> add_bos, add_eos, add_space_prefix;
  std::string_view chat_template;      ///< empty: none
  std::string_view tool_use_template;  ///< empty: none
};

/// Texts of the files beside a model that define its tokenizer; empty where there is no such file.
struct TokenizerFiles {
  std::string_view tokenizer_json;
  std::string_view tokenizer_config_json;
  std::string_view chat_template_jinja;
  std::string_view chat_template_json;
};

/// Text to ids and back, as Hugging Face's `tokenizers` does it. Immutable and cheap to copy; may be
/// used from many threads.
class Tokenizer {
 public:
  /// Error `format` or `unsupported`, naming what is wrong.
  static Tokenizer from_files(const TokenizerFiles& files);
  static Tokenizer from_gguf(const GgufVocab& vocab);

  /// Ids of a text. `add_special`: with BOS and EOS, where the tokenizer adds them. Special tokens
  /// written out in the text ("<|im_end|>") become their ids. Error `invalid_argument` if the text is
  /// not UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool add_special) const;
  /// Text of ids. Bytes that do not form UTF-8 become U+FFFD; an id that names no token makes no text
  /// (vocabularies are padded). Error `invalid_argument` for a negative id.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  /// One more than the largest id.
  int64_t vocab_size() const;
  /// The id of a token as the vocabulary spells it, "<s>"; nothing: there is none.
  std::optional<int32_t> id_of(std::string_view token) const;
  std::optional<int32_t> bos() const;
  std::optional<int32_t> eos() const;
  /// Source of the chat template that came with it.
  std::optional<std::string> chat_template() const;

 private:
  friend class ChatTemplate;
  friend class StreamingDetokenizer;
  struct State;
  explicit Tokenizer(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

/// Turns tokens into text one by one and never emits part of a character.
class StreamingDetokenizer {
 public:
  /// Keeps the tokenizer alive. Special tokens make no text.
  explicit StreamingDetokenizer(const Tokenizer& tokenizer);
  ~StreamingDetokenizer();
  StreamingDetokenizer(StreamingDetokenizer&&) noexcept;
  StreamingDetokenizer& operator=(StreamingDetokenizer&&) noexcept;

  /// The text that is certain after this id; may be empty.
  std::string push(int32_t id);
  /// What is left at the end, incomplete characters as U+FFFD.
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// One turn of a conversation, as chat templates name it.
struct Message {
  std::string role;  ///< "system", "user", "assistant"
  std::string content;
};

/// A model's chat template (Jinja), rendered as transformers does.
class ChatTemplate {
 public:
  /// The template that came with the tokenizer. Error `not_found` if there is none, `format` if it is
  /// broken.
  explicit ChatTemplate(const Tokenizer& tokenizer);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  /// Text of a conversation; `add_generation_prompt`: up to where the assistant begins. Error
  /// `invalid_argument` with the template's own message if it refuses the conversation.
  std::string render(std::span<const Message> messages, bool add_generation_prompt) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep

#include <array>

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "lockstep/text.h"

namespace lockstep::fuzz {

void fuzz_template(const uint8_t* data, size_t size) {
  attempt([&] {
    GgufVocab vocab;
    vocab.model = "llama";
    vocab.tokens = {"<unk>", "<s>", "</s>", "a"};
    vocab.scores = {0, 0, 0, 0};
    vocab.chat_template = text_of(data, size);
    const std::array<Message, 3> messages = {
        {{"system", "Be kind."}, {"user", "Hi <b>\xC3\xA9"}, {"assistant", ""}}};
    const ChatTemplate chat(Tokenizer::from_gguf(vocab));
    chat.render(messages, false);
    chat.render(std::span(messages).first(2), true);
  });
}

}  // namespace lockstep::fuzz

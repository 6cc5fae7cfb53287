#include <vector>

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "lockstep/text.h"

namespace lockstep::fuzz {

void fuzz_tokenizer(const uint8_t* data, size_t size) {
  const auto [json, config] = split(text_of(data, size));
  attempt([&] {
    const Tokenizer tokenizer = Tokenizer::from_files({json, config, {}, {}});
    attempt([&] {
      const std::vector<int32_t> ids = tokenizer.encode("<s>Two  words, 12\n\xC3\xA9\xE2\x82\xAC</s>", true);
      const std::string text = tokenizer.decode(ids, true);
      StreamingDetokenizer stream(tokenizer);
      std::string streamed;
      for (int32_t id : ids) streamed += stream.push(id);
      require(streamed + stream.finish() == text);
    });
    const Message message = {"user", "Hi"};
    if (tokenizer.chat_template()) ChatTemplate(tokenizer).render({&message, 1}, true);
  });
}

}  // namespace lockstep::fuzz

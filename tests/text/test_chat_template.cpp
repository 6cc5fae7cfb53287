// Chat templates against transformers' renderings.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lockstep/error.h"
#include "lockstep/text.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

ChatTemplate chat_of(const std::string& source) {
  const std::string tokenizer = contents(test::data_path("models/llama-text/tokenizer.json"));
  return ChatTemplate(
      Tokenizer::from_files({.tokenizer_json = tokenizer,
                             .tokenizer_config_json = R"({"bos_token": "<s>", "eos_token": "</s>"})",
                             .chat_template_jinja = source,
                             .chat_template_json = {}}));
}

TEST(ChatTemplates, RenderAsTransformers) {
  const nlohmann::json data = nlohmann::json::parse(contents(test::data_path("chat_templates.json")));
  for (const nlohmann::json& each : data.at("cases")) {
    const ChatTemplate chat = chat_of(data.at("templates").at(each.at("template").get<std::string>()));
    std::vector<Message> messages;
    for (const nlohmann::json& message :
         data.at("conversations").at(each.at("conversation").get<std::string>())) {
      messages.push_back({message.at("role"), message.at("content")});
    }
    const std::string name =
        each.at("template").get<std::string>() + " / " + each.at("conversation").get<std::string>();
    if (each.at("text").is_null()) {
      EXPECT_THROW(chat.render(messages, each.at("add_generation_prompt")), Error) << name;
      continue;
    }
    const std::string expected = each.at("text");
    EXPECT_EQ(chat.render(messages, each.at("add_generation_prompt")), expected) << name;
    for (Message& message : messages) message.content.insert(0, "!");
    EXPECT_NE(chat.render(messages, each.at("add_generation_prompt")), expected) << "a planted error passes";
  }
}

TEST(ChatTemplates, RefuseWhatIsBroken) {
  EXPECT_THROW(chat_of("{% for m in messages %}"), Error);
  EXPECT_THROW(chat_of("{{ raise_exception('no') }}").render({}, false), Error);
  EXPECT_THROW(chat_of("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}")
                   .render({}, false),
               Error)
      << "a template that never ends is stopped";
}

}  // namespace
}  // namespace lockstep

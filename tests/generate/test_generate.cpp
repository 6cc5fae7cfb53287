// The loop from prompt to text, on a tiny model with a tokenizer, against transformers' generate().
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "lockstep/error.h"
#include "lockstep/generate.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

std::shared_ptr<const Model> text_model(const std::string& name) {
  ModelOptions options;
  options.precision = Precision::f32;
  return Model::load(test::data_path("models/" + name), options);
}

Session session_of(const std::shared_ptr<const Model>& model, int64_t context = 0) {
  SessionOptions options;
  options.kv_type = KvType::f32;
  options.context = context;
  return Session(model, options);
}

nlohmann::json expected() {
  return nlohmann::json::parse(std::ifstream(test::data_path("models/llama-text/expected.json")));
}

// Continues `ids` and checks the reply, streamed and whole.
void expect_reply(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& ids,
                  const nlohmann::json& reply) {
  EXPECT_EQ(ids, reply.at("prompt_ids").get<std::vector<int32_t>>());
  Session session = session_of(model);
  GenerateOptions options;
  options.max_tokens = static_cast<int64_t>(reply.at("greedy_ids").size());
  std::string streamed;
  const Generation result = generate(session, ids, options, [&](std::string_view piece) {
    streamed += piece;
    return true;
  });
  EXPECT_EQ(result.ids, reply.at("greedy_ids").get<std::vector<int32_t>>());
  EXPECT_EQ(result.text, model->tokenizer().decode(result.ids, true));
  EXPECT_EQ(streamed, result.text);
  EXPECT_EQ(result.finish_reason, "length");
}

TEST(Generate, RepliesOfTransformers) {
  const nlohmann::json data = expected();
  for (const char* name : {"llama-text", "llama-text.gguf"}) {
    const auto model = text_model(name);
    for (const nlohmann::json& reply : data.at("raw")) {
      expect_reply(model, encode_prompt(*model, reply.at("text").get<std::string>(), {}, true), reply);
    }
    for (const nlohmann::json& reply : data.at("chats")) {
      std::vector<Message> messages;
      for (const nlohmann::json& message : reply.at("messages")) {
        messages.push_back({message.at("role"), message.at("content")});
      }
      const std::string rendered = model->chat_template()->render(messages, true);
      EXPECT_EQ(rendered, reply.at("rendered").get<std::string>());
      expect_reply(model, model->tokenizer().encode(rendered, false), reply);
    }
  }
}

TEST(Generate, TextsOfTheReferenceTokenizer) {
  const nlohmann::json data = expected();
  for (const char* name : {"llama-text", "llama-text.gguf"}) {
    const auto model = text_model(name);
    for (const nlohmann::json& each : data.at("texts")) {
      const std::vector<int32_t> ids = each.at("ids");
      EXPECT_EQ(model->tokenizer().encode(each.at("text").get<std::string>(), false), ids) << name;
      EXPECT_EQ(model->tokenizer().decode(ids, false), each.at("decoded").get<std::string>()) << name;
    }
  }
}

TEST(Generate, ReusesThePastOfItsSession) {
  const auto model = text_model("llama-text");
  const auto ids = encode_prompt(*model, "one two three four", {}, false);
  Session session = session_of(model);
  GenerateOptions options;
  options.max_tokens = 8;
  const Generation cold = generate(session, ids, options);
  EXPECT_EQ(cold.timings.reused, 0);
  const Generation warm = generate(session, ids, options);
  EXPECT_EQ(warm.timings.reused, static_cast<int64_t>(ids.size()) - 1);
  EXPECT_EQ(warm.ids, cold.ids);
  EXPECT_EQ(warm.logits_hash, cold.logits_hash);
}

TEST(Generate, Ends) {
  const auto model = text_model("llama-text");
  const auto ids = encode_prompt(*model, "one two three four", {}, false);
  GenerateOptions options;
  options.max_tokens = 12;
  options.logprobs = 3;
  Session session = session_of(model);
  const Generation whole = generate(session, ids, options);
  ASSERT_EQ(whole.ids.size(), 12U);
  ASSERT_EQ(whole.logprobs.size(), 12U);
  for (size_t i = 0; i < whole.ids.size(); ++i) {
    EXPECT_EQ(whole.logprobs[i].chosen.id, whole.ids[i]);
    EXPECT_EQ(whole.logprobs[i].top[0].id, whole.ids[i]) << "greedy takes the most likely";
  }
  // A stop string in the middle of the text ends it there.
  options.stop = {whole.text.substr(whole.text.size() / 2, 3)};
  const Generation stopped = generate(session, ids, options);
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_EQ(stopped.text, whole.text.substr(0, whole.text.find(options.stop[0])));
  // So does a caller who has seen enough, and a context that is full.
  options.stop.clear();
  int calls = 0;
  std::string first;
  const auto once = [&](std::string_view piece) {
    first = piece;
    return ++calls < 1;
  };
  EXPECT_EQ(generate(session, ids, options, once).finish_reason, "stop");
  EXPECT_EQ(calls, 1);
  ASSERT_GT(first.size(), 1U);
  options.stop = {first.back() + std::string("\n\n")};  // holds back a letter, which comes in the end
  const Generation seen = generate(session, ids, options, once);
  EXPECT_EQ(calls, 2) << "not again after it has seen enough";
  EXPECT_EQ(seen.text, model->tokenizer().decode(seen.ids, true));
  options.stop.clear();
  Session small = session_of(model, static_cast<int64_t>(ids.size()) + 2);
  const Generation full = generate(small, ids, options);
  EXPECT_EQ(full.finish_reason, "length");
  EXPECT_EQ(full.ids.size(), 3U) << "two tokens fit; the third is chosen and not fed";
  Session none = session_of(model, static_cast<int64_t>(ids.size()) - 1);
  EXPECT_THROW(generate(none, ids, options), Error);
  EXPECT_THROW(generate(session, {}, options), Error);
}

// What was computed before somebody stopped is not lost.
TEST(Generate, APromptCanBeStopped) {
  const auto model = text_model("llama-text");
  const auto ids = encode_prompt(*model, "one two three four five six seven", {}, false);
  SessionOptions brief;
  brief.kv_type = KvType::f32;
  brief.chunk = 2;
  Session session(model, brief);
  GenerateOptions options;
  options.max_tokens = 4;
  std::vector<int64_t> done;
  options.on_prompt = [&](int64_t tokens, int64_t all) {
    EXPECT_EQ(all, std::ssize(ids));
    done.push_back(tokens);
    return tokens < 4;
  };
  const Generation stopped = generate(session, ids, options);
  EXPECT_EQ(done, (std::vector<int64_t>{2, 4}));
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_TRUE(stopped.ids.empty());
  EXPECT_EQ(session.length(), 4);
  options.on_prompt = {};
  const Generation resumed = generate(session, ids, options);
  EXPECT_EQ(resumed.timings.reused, 4);
  Session other = session_of(model);
  EXPECT_EQ(resumed.ids, generate(other, ids, options).ids);
}

// A pass that yields an end id is one of decode, too.
TEST(Generate, SpeedCountsThePassThatEndsIt) {
  const auto ids = encode_prompt(*text_model("llama-text"), "one two three four", {}, false);
  GenerateOptions options;
  options.max_tokens = 2;
  Session free = session_of(text_model("llama-text"));
  const std::vector<int32_t> reply = generate(free, ids, options).ids;
  ASSERT_EQ(reply.size(), 2U);
  ASSERT_NE(reply[0], reply[1]);
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(testing::TempDir()) / ("ends-" + std::to_string(::getpid()));
  fs::copy(test::data_path("models/llama-text"), folder);
  std::ofstream(folder / "generation_config.json") << R"({"eos_token_id": )" << reply[1] << "}";
  ModelOptions f32;
  f32.precision = Precision::f32;
  const auto model = Model::load(folder, f32);
  fs::remove_all(folder);
  Session session = session_of(model);
  const Generation result = generate(session, ids, options);
  EXPECT_EQ(result.ids, std::vector<int32_t>{reply[0]});
  EXPECT_EQ(result.finish_reason, "stop");
  EXPECT_GT(result.timings.decode_tps, 0);
}

}  // namespace
}  // namespace lockstep

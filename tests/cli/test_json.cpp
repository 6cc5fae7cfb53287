// The objects that --json prints, beside what the same command prints for people.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

namespace lockstep {
namespace {

using nlohmann::json;

// What `lockstep ARGUMENTS` prints, its messages included where `messages` says so.
std::string printed(const std::string& arguments, bool messages = false) {
  const std::string line =
      "'" LOCKSTEP_BINARY "' " + arguments + (messages ? " 2>&1" : " 2>/dev/null") + " </dev/null";
  FILE* pipe = ::popen(line.c_str(), "r");
  EXPECT_NE(pipe, nullptr);
  std::string text;
  std::array<char, 4096> part;
  for (size_t size; (size = std::fread(part.data(), 1, part.size(), pipe)) > 0;)
    text.append(part.data(), size);
  EXPECT_EQ(::pclose(pipe), 0) << line << "\n" << text;
  return text;
}

std::string model(const std::string& name) { return " -m '" LOCKSTEP_TEST_DATA "/models/" + name + "'"; }

TEST(Json, GenerateSaysTheSameAsItsText) {
  const std::string command =
      "generate --raw -p 'one two' -n 4 -t 2 --precision fast" + model("llama-text.gguf");
  const json object = json::parse(printed(command + " --json"));
  EXPECT_EQ(object["threads"], 2);
  EXPECT_EQ(object["precision"], "fast");
  EXPECT_EQ(object["kv_type"], "i16");
  EXPECT_EQ(object["text"].get<std::string>() + "\n", printed(command));
  const std::string summary = printed(command, true);
  for (const char* key : {"isa", "logits_hash"})
    EXPECT_NE(summary.find(object[key].get<std::string>()), std::string::npos) << key << " " << summary;
  EXPECT_EQ(object["logits_hash"].get<std::string>().size(), 16U);
}

TEST(Json, BenchNamesThePeakThatBoundsAPrefill) {
  const std::string command = "bench --json -t 1 --prefill 4 --decode 2 --repeat 1";
  const auto limit = [&](const std::string& flags) {
    const json object = json::parse(printed(command + flags));
    const std::string name = object["prefill_limit"];
    const double peak = object["limits"][name + "_gops"];
    EXPECT_GT(peak, 0) << flags;
    EXPECT_NEAR(object["prefill_share"].get<double>(), object["prefill_gops"].get<double>() / peak, 1e-9);
    return name;
  };
  EXPECT_EQ(limit(model("llama-q.Q4_0.gguf")), "int8");
  EXPECT_EQ(limit(model("llama-q.Q4_0.gguf") + " --precision f32"), "f32");
  EXPECT_EQ(limit(model("llama.gguf")), "f32");
}

}  // namespace
}  // namespace lockstep

// Exit statuses of the verbs: 0 within, 1 divergent, 2 cannot conclude, 3 usage or output.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>

#include "support/traces.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::captured;
using test::model_of;

class Verbs : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    fs::create_directory_symlink(model_of(""), folder_ / "models");
    fs::create_directory_symlink(captured(""), folder_ / "traces");
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Exit status of `lockstep COMMAND`, run in the folder; `said`: what it wrote.
  int run(const std::string& command, std::string to = {}) {
    if (to.empty()) to = "output";
    const int status = std::system(
        ("cd '" + folder_.string() + "' && '" + LOCKSTEP_BINARY + "' " + command + " > " + to + " 2> errors")
            .c_str());
    said_ = text("output") + text("errors");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  std::string text(const std::string& file) const {
    std::ifstream stream(folder_ / file);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  bool said(const std::string& part) const { return said_.find(part) != std::string::npos; }

  fs::path folder_ = fs::path(testing::TempDir()) / ("verbs-" + std::to_string(::getpid()));
  std::string said_;
};

TEST_F(Verbs, OutputThatIsLostDecidesNothing) {
  for (const char* command : {"diff traces/llama traces/llama", "replay -m models/llama traces/llama",
                              "bisect -m models/llama traces/llama --inject rope-interleaved",
                              "trace --validate traces/llama", "trace --inject list"}) {
    EXPECT_EQ(run(command, "/dev/full"), 3) << command;
    EXPECT_TRUE(said("[stdout] write")) << said_;
  }
}

TEST_F(Verbs, FaultsWithoutEffectAreUsage) {
  const std::string ids = "--ids 1,2,3";
  for (const std::string& command :
       {"trace -m models/llama " + ids + " -o out --inject router-top-1",
        "trace -m models/llama " + ids + " -o out --inject kv-lost-in-decode",
        "trace -m models/llama " + ids + " -o out --inject embedding-scale@layer=1",
        std::string("replay -m models/llama traces/llama --inject router-top-1"),
        std::string("bisect -m models/llama traces/llama --inject window-missing"),
        std::string("check -m models/llama --inject rows-share-keys")}) {
    EXPECT_EQ(run(command), 3) << command;
    EXPECT_TRUE(said("[inject]")) << said_;
    EXPECT_FALSE(fs::exists(folder_ / "out"));
  }
  EXPECT_EQ(run("trace -m models/llama " + ids + " --steps 1 -o out --inject kv-lost-in-decode"), 0) << said_;
}

TEST_F(Verbs, FaultsAreListedWithoutAnythingElse) {
  for (const char* verb : {"generate", "check", "bisect", "replay", "trace"}) {
    EXPECT_EQ(run(std::string(verb) + " --inject list"), 0) << verb << said_;
    EXPECT_TRUE(said("rope-flatten-heads")) << said_;
    EXPECT_EQ(text("errors"), "");
  }
}

TEST_F(Verbs, HelpIsPrintedHoweverItIsAskedFor) {
  ASSERT_EQ(run("--help"), 0);
  const std::string help = text("output");
  EXPECT_EQ(run("help"), 0);
  EXPECT_EQ(text("output"), help);
  EXPECT_EQ(run(""), 3);
  EXPECT_EQ(text("output"), help);
  ASSERT_EQ(run("trace --help"), 0);
  const std::string of_verb = text("output");
  EXPECT_EQ(run("help trace"), 0);
  EXPECT_EQ(text("output"), of_verb);
}

TEST_F(Verbs, HelpFitsEightyColumns) {
  for (const std::string verb :
       {"", "generate", "chat", "tokenize", "logits", "perplexity", "inspect", "pull", "bench", "trace",
        "diff", "replay", "bisect", "floor", "check", "selftest"}) {
    ASSERT_EQ(run("help " + verb), 0) << said_;
    std::istringstream help(text("output"));
    for (std::string line; std::getline(help, line);) EXPECT_LE(line.size(), 80) << verb << ": " << line;
  }
}

TEST_F(Verbs, UsageIsNeverInconclusive) {
  EXPECT_EQ(run("trace -m models/llama --ids 1 --steps 100000 -o out"), 3) << said_;
  EXPECT_EQ(run("trace -m models/llama/model.safetensors --ids 1 -o out"), 3) << said_;
  EXPECT_EQ(run("bisect -m models/llama/model.safetensors traces/llama"), 3) << said_;
  EXPECT_EQ(run("replay -m models/llama/config.json traces/llama"), 3) << said_;
  EXPECT_EQ(run("trace -m models/llama --ids 1 -c 4 -o out"), 3) << said_;
  EXPECT_EQ(run("replay -m models/llama traces/llama -c 4"), 3) << said_;
}

TEST_F(Verbs, ATraceDoesNotReplaceWhatItFollows) {
  ASSERT_EQ(run("trace -m models/llama --ids 1,2 -o mine"), 0);
  const std::string before = text("mine/manifest.json");
  EXPECT_EQ(run("trace -m models/llama --follow mine -o mine/"), 3);
  EXPECT_TRUE(said("expected another directory than --follow")) << said_;
  EXPECT_EQ(text("mine/manifest.json"), before);
}

TEST_F(Verbs, AModelThatCannotBeRunIsInspected) {
  fs::copy(model_of("llama"), folder_ / "other");
  std::string config = text("models/llama/config.json");
  const std::string known = R"("model_type": "llama")";
  ASSERT_NE(config.find(known), config.npos);
  std::ofstream(folder_ / "other/config.json")
      << config.replace(config.find(known), known.size(), R"("model_type": "bloom")");
  EXPECT_EQ(run("inspect other --tensors"), 1);
  EXPECT_TRUE(text("output").starts_with("file          other")) << said_;
  EXPECT_TRUE(said("architecture  bloom\n")) << said_;
  EXPECT_TRUE(said("model.layers.0.self_attn.q_proj.weight\n")) << said_;
  EXPECT_TRUE(said("[other] architecture: expected one of ")) << said_;
}

TEST_F(Verbs, NothingToBundleIsSaid) {
  EXPECT_EQ(run("replay -m models/mistral traces/mixtral --bundle b.safetensors"), 2) << said_;
  EXPECT_TRUE(said("; ours is models/mistral")) << said_;
  EXPECT_TRUE(said("the models differ: mistral, and mixtral")) << said_;
  EXPECT_FALSE(fs::exists(folder_ / "b.safetensors"));
}

TEST_F(Verbs, RoundingWithoutAFloorIsInconclusive) {
  ASSERT_EQ(run("trace -m models/llama --ids 1,2,3 -o reference"), 0);
  ASSERT_EQ(run("trace -m models/llama --follow reference --precision exact --kv-type f16 -o mine"), 0);
  EXPECT_EQ(run("diff mine reference"), 2);
  EXPECT_TRUE(said("no floor for policy exact/f16: measure one")) << said_;
}

TEST_F(Verbs, OneTraceIsNoNoise) {
  ASSERT_EQ(run("trace -m models/llama --ids 1,2,3 -o truth"), 0);
  ASSERT_EQ(run("trace -m models/llama --ids 1,2,3 --precision exact -o variant"), 0);
  EXPECT_EQ(run("floor truth variant truth/ -o floor.json"), 3);
  EXPECT_TRUE(said("expected another computation than the truth, got the same trace")) << said_;
  EXPECT_FALSE(fs::exists(folder_ / "floor.json"));
  EXPECT_EQ(run("floor truth variant -o floor.json"), 0) << said_;
  EXPECT_TRUE(said("floor.json: the noise floor of f32/f32")) << said_;
}

TEST_F(Verbs, TracesNamedInTheWrongOrderAreSaid) {
  ASSERT_EQ(run("trace -m models/llama --follow traces/llama -o mine"), 0) << said_;
  run("diff traces/llama mine");
  EXPECT_TRUE(said("floor.json lies beside the subject, traces/llama; the subject is named first")) << said_;
  EXPECT_EQ(run("diff traces/llama mine --policy f32/f32"), 3);
  EXPECT_TRUE(said("got one beside the subject: name the subject first")) << said_;
  EXPECT_EQ(run("diff mine traces/llama"), 0) << said_;
  EXPECT_FALSE(said("floor.json")) << said_;
}

}  // namespace
}  // namespace lockstep

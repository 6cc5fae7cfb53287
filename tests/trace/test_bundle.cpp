// One operation in one file: run again, damaged, and of every architecture.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::captured;
using test::model_of;

class Bundles : public testing::Test {
 protected:
  void TearDown() override { fs::remove(file_); }

  DiffReport run(const std::string& name, const Trace& reference, int step, int layer,
                 const std::string& site, const std::string& policy = "f32/f32") {
    SiteScore place;
    place.step = step;
    place.layer = layer;
    place.site = site;
    place.floor = Floor(captured(name) / "floor.json", policy).at(step > 0, place.name(), 96);
    write_bundle(file_, model_of(name), reference, place, policy);
    return replay_bundle(file_, {});
  }
  std::string bytes() const {
    std::ifstream stream(file_, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  fs::path file_ = fs::path(testing::TempDir()) / ("bundle-" + std::to_string(::getpid()) + ".safetensors");
};

TEST_F(Bundles, EveryOperationRunsAgain) {
  int ran = 0;
  for (const char* name : {"llama", "llama-llama3", "llama-linear", "llama-yarn", "mistral", "qwen2",
                           "qwen2-window", "mixtral", "llama-q.Q4_1.gguf", "llama-mlx-4bit"}) {
    const Trace reference = Trace::open(captured(name));
    for (const TraceEvent& event : reference.events()) {
      if (event.row != 0 || (event.step != 0 && event.step != 2)) continue;
      DiffReport report;
      try {
        report = run(name, reference, event.step, event.layer, event.site);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
        EXPECT_TRUE(event.site == "moe_out" || event.site.starts_with("expert_") || event.site == "scores" ||
                    event.site == "probs" || event.site.ends_with("_cache"))
            << name << " " << event.name() << ": " << error.what();
        continue;
      }
      EXPECT_EQ(report.verdict, Verdict::within) << name << " " << event.name() << ", step " << event.step;
      EXPECT_EQ(report.scores.at(0).name(), event.name());
      ++ran;
    }
  }
  EXPECT_GT(ran, 400);
}

TEST_F(Bundles, AWrongExpectationShows) {
  const Trace reference =
      test::edited(Trace::open(captured("llama")), [](TraceEvent& event, std::vector<float>& values) {
        if (event.site == "q_rope") values[0] += 0.01F;
        return true;
      });
  const DiffReport report = run("llama", reference, 0, 1, "q_rope");
  EXPECT_EQ(report.verdict, Verdict::divergent);
  EXPECT_EQ(report.first->name(), "L01.q_rope");
  EXPECT_EQ(report.first->bad_heads, std::vector<int>{0});
}

TEST_F(Bundles, DamagedFilesAreRefused) {
  const Trace reference = Trace::open(captured("llama-q.Q4_1.gguf"));
  run("llama-q.Q4_1.gguf", reference, 1, 1, "attn_ctx");
  const std::string whole = bytes();
  int refused = 0;
  const auto attempt = [&](const std::string& content) {
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << content;
    try {
      replay_bundle(file_, {});
    } catch (const Error&) {
      ++refused;
    }
  };
  for (size_t size = 0; size < whole.size(); size += whole.size() / 40) attempt(whole.substr(0, size));
  EXPECT_GE(refused, 40);
  // A word changed in what is said of it.
  for (const char* word : {R"("op\":\"attention)", R"("positions)", R"("scale)", R"("window)", R"("floor)",
                           R"("version)", R"("policy\":\"f32)", "input.k_rope", "F32"}) {
    std::string changed = whole;
    const size_t at = changed.find(word);
    ASSERT_NE(at, std::string::npos) << word;
    char& letter = changed[at + std::string_view(word).size() - 1];
    letter = letter == 'x' ? 'y' : 'x';
    const int before = refused;
    attempt(changed);
    EXPECT_EQ(refused, before + 1) << word;
  }
}

// What the format says of a weight has to fit its bytes, or products would read and write beyond them.
TEST_F(Bundles, WeightsThatCannotBeAreRefused) {
  struct Change {
    const char *model, *from, *to;
  };
  for (const Change& change : std::initializer_list<Change>{
           {"llama-q.Q4_1.gguf", R"(dtype\":\"q4_1)", R"(dtype\":\"q4_k)"},
           {"llama-q.Q4_1.gguf", R"(dtype\":\"q4_1)", R"(dtype\":\"bool)"},
           {"llama-q.Q4_1.gguf", R"(group_size\":0)", R"(group_size\":8)"},
           {"llama-mlx-4bit", R"(group_size\":64,\"inter)", R"(group_size\": 0,\"inter)"},
           {"llama-mlx-4bit", R"(group_size\":64,\"inter)", R"(group_size\":16,\"inter)"},
           {"llama-mlx-4bit", R"(scale_dtype\":\"bf16\")", R"(scale_dtype\": \"i16\")"}}) {
    run(change.model, Trace::open(captured(change.model)), 0, 0, "q_proj");
    std::string content = bytes();
    const size_t at = content.find(change.from);
    ASSERT_NE(at, std::string::npos) << change.from;
    content.replace(at, std::string_view(change.from).size(), change.to);
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << content;
    EXPECT_THROW(replay_bundle(file_, {}), Error) << change.model << " " << change.to;
  }
}

}  // namespace
}  // namespace lockstep

// Sampling against transformers' processors; stop strings.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lockstep/error.h"
#include "lockstep/generate.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

nlohmann::json fixture() { return nlohmann::json::parse(std::ifstream(test::data_path("sampling.json"))); }

SamplingOptions options_of(const nlohmann::json& setting) {
  SamplingOptions options;
  options.temperature = setting.value("temperature", 0.0F);
  options.top_k = setting.value("top_k", int64_t{0});
  options.top_p = setting.value("top_p", 1.0F);
  options.min_p = setting.value("min_p", 0.0F);
  options.repeat_penalty = setting.value("repeat_penalty", 1.0F);
  return options;
}

// Shares of the tokens drawn at `count` positions.
std::vector<double> shares(const SamplingOptions& options, const std::vector<float>& logits,
                           const std::vector<int32_t>& context, int count) {
  std::vector<double> result(logits.size());
  const Sampler sampler(options);
  for (int i = 0; i < count; ++i) result[sampler.sample(logits, context, i)] += 1.0 / count;
  return result;
}

// Largest distance in standard deviations of a share of `count` draws; infinite for a token that must not
// occur.
double distance(const std::vector<double>& shares, const std::vector<double>& expected, int count) {
  double worst = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    if (expected[i] < 1e-9) {
      if (shares[i] > 0) return std::numeric_limits<double>::infinity();
      continue;
    }
    const double deviation = std::sqrt(expected[i] * (1 - expected[i]) / count) + 1e-12;
    worst = std::max(worst, std::abs(shares[i] - expected[i]) / deviation);
  }
  return worst;
}

TEST(Sampling, SharesAreThoseOfTransformers) {
  constexpr int kDraws = 40000;
  constexpr double kFar = 4.5;  // standard deviations; the draws are the same in every run
  const nlohmann::json data = fixture();
  for (const nlohmann::json& each : data.at("cases")) {
    const auto drawn = shares(options_of(each.at("setting")), data.at("logits"), data.at("context"), kDraws);
    const std::vector<double> expected = each.at("probabilities");
    EXPECT_LE(distance(drawn, expected, kDraws), kFar) << each.at("setting");
    SamplingOptions wrong = options_of(each.at("setting"));
    wrong.temperature *= 1.1F;
    EXPECT_GT(distance(shares(wrong, data.at("logits"), data.at("context"), kDraws), expected, kDraws), kFar)
        << "a planted error passes";
  }
}

TEST(Sampling, GreedyTakesTheLowerIdOfATie) {
  const std::vector<float> logits = {0, 3, 1, 3};
  EXPECT_EQ(Sampler({}).sample(logits, {}, 0), 1);
  SamplingOptions biased;
  biased.logit_bias = {{2, 5.0F}};
  EXPECT_EQ(Sampler(biased).sample(logits, {}, 0), 2);
}

TEST(Sampling, ATinyTemperatureTakesTheLikeliest) {
  const std::vector<float> logits = {-3, 11, 12, 14, 13};
  for (const int64_t top_k : {0, 1, 3}) {
    SamplingOptions options;
    options.temperature = 1e-39F;
    options.top_k = top_k;
    for (int i = 0; i < 20; ++i) EXPECT_EQ(Sampler(options).sample(logits, {}, i), 3) << top_k;
  }
}

TEST(Sampling, SeedAndPositionDecide) {
  const nlohmann::json data = fixture();
  SamplingOptions options;
  options.temperature = 1;
  const auto draw = [&](uint64_t seed) {
    options.seed = seed;
    std::vector<int32_t> ids;
    for (int i = 0; i < 20; ++i)
      ids.push_back(Sampler(options).sample(data.at("logits").get<std::vector<float>>(), {}, i));
    return ids;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(Sampling, RefusesWrongOptions) {
  using Set = void (*)(SamplingOptions&);
  for (const Set set : std::initializer_list<Set>{
           [](SamplingOptions& o) { o.temperature = -1; }, [](SamplingOptions& o) { o.temperature = NAN; },
           [](SamplingOptions& o) { o.top_k = -1; }, [](SamplingOptions& o) { o.top_p = 0; },
           [](SamplingOptions& o) { o.top_p = 1.5F; }, [](SamplingOptions& o) { o.min_p = -0.1F; },
           [](SamplingOptions& o) { o.repeat_penalty = 0; }, [](SamplingOptions& o) { o.repeat_window = -1; },
           [](SamplingOptions& o) { o.logit_bias[3] = NAN; }}) {
    SamplingOptions wrong;
    set(wrong);
    EXPECT_THROW(Sampler{wrong}, Error);
  }
  const std::vector<float> none(4, -std::numeric_limits<float>::infinity());
  EXPECT_THROW(Sampler({}).sample(none, {}, 0), Error);
  const std::vector<float> broken = {1, NAN, 2};
  EXPECT_THROW(Sampler({}).sample(broken, {}, 0), Error);
}

TEST(Logprobs, AreThoseOfTorch) {
  const nlohmann::json data = fixture();
  const std::vector<float> logits = data.at("logits");
  const std::vector<float> expected = data.at("logprobs");
  const Logprobs got = logprobs(logits, 5, static_cast<int64_t>(logits.size()));
  EXPECT_EQ(got.chosen.id, 5);
  EXPECT_NEAR(got.chosen.logprob, expected[5], 1e-5);
  ASSERT_EQ(got.top.size(), logits.size());
  for (size_t i = 0; i < got.top.size(); ++i) {
    EXPECT_NEAR(got.top[i].logprob, expected[static_cast<size_t>(got.top[i].id)], 1e-5);
    EXPECT_GE(got.top[i > 0 ? i - 1 : 0].logprob, got.top[i].logprob);
  }
}

struct StopCase {
  std::vector<std::string> stops;
  std::vector<std::string> pieces;
  std::string text;
  bool stopped;
};

TEST(Stop, StringsAcrossPieces) {
  const std::vector<StopCase> cases = {
      {{}, {"a", "b"}, "ab", false},
      {{"END"}, {"one E", "N", "D two"}, "one ", true},
      {{"END"}, {"one E", "N", "d two"}, "one ENd two", false},
      {{"aab"}, {"aa", "aab"}, "aa", true},
      {{"abc", "b"}, {"xab"}, "xa", true},
      {{"\n\n"}, {"a\n", "b\n", "\nc"}, "a\nb", true},
      {{"END"}, {"cut EN"}, "cut EN", false},
      {{"é"}, {"caf\xC3", "\xA9!"}, "caf", true},
  };
  for (const StopCase& each : cases) {
    StopFilter filter(each.stops);
    std::string text;
    for (const std::string& piece : each.pieces) text += filter.push(piece);
    text += filter.finish();
    EXPECT_EQ(text, each.text);
    EXPECT_EQ(filter.stopped(), each.stopped) << each.text;
  }
  EXPECT_THROW(StopFilter({""}), Error);
}

}  // namespace
}  // namespace lockstep

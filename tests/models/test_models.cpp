// Every architecture and file format against transformers in f32 on the same dequantised weights.
#include <gtest/gtest.h>

#include <filesystem>
#include <ostream>
#include <string>

#include "lockstep/model.h"
#include "lockstep/session.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

struct Fixture {
  std::string model;     // below tests/data/models
  std::string expected;  // likewise
};
void PrintTo(const Fixture& fixture, std::ostream* out) { *out << fixture.model; }

// The twins of a folder hold its weights in another layout.
std::string without_ending(const std::string& name, std::string_view ending) {
  return name.ends_with(ending) ? name.substr(0, name.size() - ending.size()) : name;
}

// Every directory and .gguf of the fixtures; the expectation lies inside or beside it.
std::vector<Fixture> fixtures() {
  std::vector<Fixture> found;
  for (const auto& entry : std::filesystem::directory_iterator(test::data_path("models"))) {
    const std::string name = entry.path().filename().string();
    if (entry.is_directory()) {
      found.push_back({name, without_ending(name, "-mlx") + "/expected.safetensors"});
    } else if (entry.path().extension() == ".gguf" && name != "llama-text.gguf") {  // a tokenizer's
      const std::string stem = entry.path().stem().string();
      const bool own = std::filesystem::exists(test::data_path("models/" + stem + ".expected.safetensors"));
      const std::string folder = without_ending(stem, "-split");
      found.push_back({name, own ? stem + ".expected.safetensors" : folder + "/expected.safetensors"});
    }
  }
  std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.model < b.model; });
  return found;
}

std::shared_ptr<const Model> load(const std::string& name, Precision precision, const std::string& isa = {},
                                  int threads = 2) {
  ModelOptions options;
  options.precision = precision;
  options.isa = isa;
  options.threads = threads;
  return Model::load(test::data_path("models/" + name), options);
}

class AgainstTransformers : public testing::TestWithParam<Fixture> {};

void compare(const Fixture& fixture, Precision precision, KvType kv, double bound) {
  const auto arrays = test::load_arrays("models/" + fixture.expected);
  const auto model = load(fixture.model, precision);
  SessionOptions options;
  options.kv_type = kv;
  const auto ids = arrays.at("ids").ints();
  // transformers takes the factor of `dynamic` from the length of the prefill that it runs; those
  // fixtures have no decode steps.
  const auto declare_context = [&](size_t length) {
    if (!arrays.contains("decode_ids")) options.context = static_cast<int64_t>(length);
  };
  declare_context(ids.size());
  Session session(model, options);
  const Tensor prefill = session.append(ids);
  EXPECT_LE(test::nmse(prefill.values(), arrays.at("logits").floats()), bound) << "prefill";
  std::vector<float> damaged(prefill.values().begin(), prefill.values().end());
  damaged[damaged.size() / 2] += 1.0F;
  EXPECT_GT(test::nmse(damaged, arrays.at("logits").floats()), bound) << "a planted error passes";
  if (arrays.contains("decode_ids")) {
    const auto decode_ids = arrays.at("decode_ids").ints();
    Tensor decode(arrays.at("decode_logits").shape);
    for (size_t i = 0; i < decode_ids.size(); ++i) {
      const Tensor step = session.append({&decode_ids[i], 1});
      std::copy_n(step.data(), step.size(), decode.row(static_cast<int64_t>(i)));
    }
    EXPECT_LE(test::nmse(decode.values(), arrays.at("decode_logits").floats()), bound) << "decode";
  }
  if (arrays.contains("ragged_ids")) {
    const auto lengths = arrays.at("ragged_lengths").ints();
    const auto all = arrays.at("ragged_ids").ints();
    std::vector<Session> sessions;
    std::vector<std::span<const int32_t>> parts;
    sessions.reserve(lengths.size());
    size_t begin = 0;
    for (int32_t length : lengths) {
      declare_context(static_cast<size_t>(length));
      sessions.emplace_back(model, options);
      parts.push_back(all.subspan(begin, static_cast<size_t>(length)));
      begin += static_cast<size_t>(length);
    }
    std::vector<Session*> pointers;
    for (Session& each : sessions) pointers.push_back(&each);
    std::vector<float> joined;
    for (const Tensor& part : append_together(pointers, parts)) {
      joined.insert(joined.end(), part.values().begin(), part.values().end());
    }
    EXPECT_LE(test::nmse(joined, arrays.at("ragged_logits").floats()), bound) << "ragged batch";
  }
}

TEST_P(AgainstTransformers, F32) { compare(GetParam(), Precision::f32, KvType::f32, 1e-10); }
TEST_P(AgainstTransformers, ExactKvF32) { compare(GetParam(), Precision::exact, KvType::f32, 5e-8); }
TEST_P(AgainstTransformers, ExactKvI16) { compare(GetParam(), Precision::exact, KvType::i16, 2e-6); }
TEST_P(AgainstTransformers, ExactKvF16) { compare(GetParam(), Precision::exact, KvType::f16, 1e-6); }

INSTANTIATE_TEST_SUITE_P(Models, AgainstTransformers, testing::ValuesIn(fixtures()), [](const auto& info) {
  std::string name = info.param.model;
  for (char& c : name) c = std::isalnum(c) != 0 ? c : '_';
  return name;
});

}  // namespace
}  // namespace lockstep

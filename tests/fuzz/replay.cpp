// Every input of the kept corpus through its target, under the tests' own compiler.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>

#include "fuzz/targets.h"

namespace lockstep::fuzz {
namespace {

struct Corpus {
  std::string name;
  Target* target;
};

class Replay : public testing::TestWithParam<Corpus> {};

TEST_P(Replay, EndsInAValueOrAnError) {
  int inputs = 0;
  const auto corpus = std::filesystem::path(__FILE__).parent_path() / "corpus" / GetParam().name;
  for (const auto& file : std::filesystem::directory_iterator(corpus)) {
    std::ifstream stream(file.path(), std::ios::binary);
    const std::string input{std::istreambuf_iterator<char>(stream), {}};
    SCOPED_TRACE(file.path().filename().string());
    EXPECT_NO_THROW(GetParam().target(reinterpret_cast<const uint8_t*>(input.data()), input.size()));
    ++inputs;
  }
  EXPECT_GT(inputs, 2);
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Replay,
                         testing::Values(Corpus{"gguf", fuzz_gguf}, Corpus{"safetensors", fuzz_safetensors},
                                         Corpus{"index", fuzz_index}, Corpus{"config", fuzz_config},
                                         Corpus{"zip", fuzz_zip}, Corpus{"page", fuzz_page},
                                         Corpus{"tokenizer", fuzz_tokenizer},
                                         Corpus{"template", fuzz_template}, Corpus{"trace", fuzz_trace},
                                         Corpus{"bundle", fuzz_bundle}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lockstep::fuzz

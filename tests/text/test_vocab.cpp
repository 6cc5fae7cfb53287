// Tokenizers built from GGUF metadata, against llama.cpp's test texts; text that arrives token by token.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "format/gguf.h"
#include "format/gguf_vocab.h"
#include "lockstep/text.h"
#include "support/fixtures.h"
#include "tensor/memory_map.h"

namespace lockstep {
namespace {

struct Case {
  std::string text;
  std::vector<int32_t> ids;
};

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<Case> cases_of(const std::string& vocab) {
  const std::string input = contents(test::data_path("vocab/" + vocab + ".inp"));
  std::istringstream lines(contents(test::data_path("vocab/" + vocab + ".out")));
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::vector<Case> cases;
  for (size_t begin = 0; begin <= input.size();) {
    const size_t end = std::min(input.find(separator, begin), input.size());
    std::string line;
    std::getline(lines, line);
    std::istringstream numbers(line);
    cases.push_back({input.substr(begin, end - begin), {std::istream_iterator<int32_t>(numbers), {}}});
    begin = end + separator.size();
  }
  return cases;
}

Tokenizer tokenizer_of(const std::string& vocab) {
  const MemoryMap map(test::data_path("vocab/" + vocab));
  return Tokenizer::from_gguf(gguf_vocab(Gguf(map.bytes(), vocab)));
}

class Vocabulary : public testing::TestWithParam<const char*> {};

TEST_P(Vocabulary, IdForId) {
  const Tokenizer tokenizer = tokenizer_of(GetParam());
  const std::vector<Case> cases = cases_of(GetParam());
  EXPECT_GE(cases.size(), 40U);
  for (Case each : cases) {
    EXPECT_EQ(tokenizer.encode(each.text, false), each.ids) << "text: " << each.text;
    if (each.ids.empty()) continue;
    each.ids.back() += 1;
    EXPECT_NE(tokenizer.encode(each.text, false), each.ids) << "a planted error passes";
  }
}

bool whole_characters(const std::string& text) {
  size_t left = 0;
  for (const unsigned char c : text) {
    if ((c & 0xC0U) == 0x80U) {
      if (left-- == 0) return false;
      continue;
    }
    if (left != 0) return false;
    left = c >= 0xF0U ? 3 : c >= 0xE0U ? 2 : c >= 0xC0U ? 1 : 0;
  }
  return left == 0;
}

TEST_P(Vocabulary, TextTokenByToken) {
  const Tokenizer tokenizer = tokenizer_of(GetParam());
  for (const Case& each : cases_of(GetParam())) {
    StreamingDetokenizer detokenizer(tokenizer);
    std::string streamed;
    for (const int32_t id : each.ids) {
      const std::string piece = detokenizer.push(id);
      EXPECT_TRUE(whole_characters(piece)) << "half a character of: " << each.text;
      streamed += piece;
    }
    streamed += detokenizer.finish();
    EXPECT_EQ(streamed, tokenizer.decode(each.ids, true));
  }
}

INSTANTIATE_TEST_SUITE_P(LlamaCpp, Vocabulary,
                         testing::Values("ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-bpe.gguf",
                                         "ggml-vocab-llama-spm.gguf", "ggml-vocab-phi-3.gguf",
                                         "ggml-vocab-qwen2.gguf"));

}  // namespace
}  // namespace lockstep

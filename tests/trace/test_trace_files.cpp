// Trace directories: what is refused when one is read, and what becomes of what was there when one is
// written.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::captured;
using test::follow;
using test::model_of;
using test::subject;

class TraceFiles : public testing::Test {
 protected:
  void SetUp() override { fs::remove_all(folder_); }
  void TearDown() override { fs::remove_all(folder_); }

  void copy(const fs::path& trace) const {
    fs::remove_all(folder_);
    fs::copy(trace, folder_);
    EXPECT_NO_THROW(Trace::open(folder_));
  }
  std::string contents(const std::string& file) const {
    std::ifstream stream(folder_ / file, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  void write(const std::string& file, const std::string& text) const {
    std::ofstream(folder_ / file, std::ios::binary) << text;
  }
  // The message with which a trace is refused in which one string stands for another.
  std::string refusal(const std::string& file, const std::string& from, const std::string& to) const {
    copy(captured("llama"));
    std::string text = contents(file);
    const size_t place = text.find(from);
    EXPECT_NE(place, std::string::npos) << from;
    write(file, text.replace(place, from.size(), to));
    return message();
  }
  std::string message() const {
    try {
      Trace::open(folder_);
    } catch (const Error& error) {
      return error.what();
    }
    return "none";
  }
  bool alone() const {
    const std::string name = folder_.filename().string();
    for (const auto& each : fs::directory_iterator(folder_.parent_path())) {
      const std::string other = each.path().filename().string();
      if (other != name && other.starts_with(name)) return false;
    }
    return true;
  }

  fs::path folder_ = fs::path(testing::TempDir()) / ("trace-files-" + std::to_string(::getpid()));
};

TEST_F(TraceFiles, ValuesThatDoNotFitAreRefusedByName) {
  const std::tuple<const char*, const char*, const char*, const char*> cases[] = {
      {"events.jsonl", R"("step": 1)", R"("step": 4294967297)", "step: expected a whole number"},
      {"events.jsonl", R"("row": 1)", R"("row": 1.0)", "row: expected a whole number"},
      {"events.jsonl", R"("layer": 1)", R"("layer": "1")", "layer: expected a whole number"},
      {"events.jsonl", R"("layer": 1)", R"("layer": 2)", "events: expected layers 0 to 1"},
      {"events.jsonl", R"("pos": [0, 13])", R"("pos": [1, 14])", "events: expected positions 0 to 13"},
      {"events.jsonl", R"("pos": [13, 14])", R"("pos": [14, 15])", "events: expected positions 13 to 14"},
      {"events.jsonl", R"("axes": "T C")", R"("width": 1000000000000000, "axes": "T C")", "width: expected"},
      {"manifest.json", R"("version": 1,)", R"("version": 1.5,)", "version: expected a whole number"},
      {"manifest.json", R"("level": 2)", R"("level": 4294967298)", "level: expected a whole number"},
      {"manifest.json", R"("layers": 2)", R"("layers": -5)", "layers: expected 0 to"},
      {"manifest.json", "57,", "57.7,", "ids: expected an array of whole numbers"},
      {"manifest.json", "57,", "4294967353,", "ids: expected an array of whole numbers"},
      {"manifest.json", "57,", "-57,", "ids: expected none below 0"},
      {"manifest.json", R"("sites": [)", R"("sites": [], "other": [)", "sites: expected those recorded"},
      {"manifest.json", R"("precision": "f32")", R"("precision": "f33")", "precision: expected one of f32"},
      {"manifest.json", R"("kv_type": "f32")", R"("kv_type": "")", "kv_type: expected one of f32"},
  };
  for (const auto& [file, from, to, message] : cases)
    EXPECT_NE(refusal(file, from, to).find(message), std::string::npos)
        << to << ": " << refusal(file, from, to);
}

TEST_F(TraceFiles, PartsThatOverlapAreRefused) {
  copy(captured("llama"));
  const std::string lines = contents("events.jsonl");
  // One row of the first prefill again, as a chunk: a decode step has a tensor of one row.
  const size_t decode = lines.find(R"("phase": "decode")");
  const size_t begin = lines.rfind('\n', decode) + 1;
  std::string line = lines.substr(begin, lines.find('\n', decode) - begin);
  const auto replace = [&](const std::string& from, const std::string& to) {
    ASSERT_NE(line.find(from), std::string::npos) << from;
    line.replace(line.find(from), from.size(), to);
  };
  replace(R"("phase": "decode")", R"("phase": "prefill")");
  replace(R"("step": 1)", R"("step": 0)");
  replace(R"("pos": [13, 14])", R"("pos": [4, 5])");
  write("events.jsonl", lines + line + "\n");
  EXPECT_NE(message().find("each position of a site once"), std::string::npos) << message();
}

// One bit of one number, under each of the rules of hashes.
TEST_F(TraceFiles, BytesThatDoNotFitTheirHashAreRefused) {
  const auto damaged = [&](const std::string& key) {
    std::string bytes = contents("tensors-00000.safetensors");
    bytes[bytes.size() - 3] = static_cast<char>(bytes[bytes.size() - 3] ^ 1);
    write("tensors-00000.safetensors", bytes);
    EXPECT_NE(message().find(folder_.string()), std::string::npos) << message();
    EXPECT_NE(message().find("tensors-00000.safetensors#"), std::string::npos) << key << message();
    EXPECT_NE(message().find("expected values of hash"), std::string::npos) << key << message();
  };
  copy(captured("llama"));
  damaged("sha256");
  copy(subject("sample"));
  damaged("sha256, reduced");
  TraceOptions options = follow(Trace::open(captured("llama")));
  fs::remove_all(folder_);
  record_trace_to(folder_, model_of("llama"), options);
  EXPECT_NE(contents("manifest.json").find(R"("hash": "fnv1a-64-f32")"), std::string::npos);
  damaged("fnv1a");
  // Another engine's own strings are only compared with each other.
  copy(captured("llama"));
  std::string lines = contents("events.jsonl");
  for (size_t at = 0; (at = lines.find(R"("hash": ")", at)) != std::string::npos; at += 10)
    lines[at + 9] = 'x';
  write("events.jsonl", lines);
  EXPECT_NE(message().find("expected values of hash"), std::string::npos) << message();
  std::string manifest = contents("manifest.json");
  const std::string rule = R"("hash": "sha256-16",)";
  ASSERT_NE(manifest.find(rule), std::string::npos);
  write("manifest.json", manifest.erase(manifest.find(rule), rule.size()));
  EXPECT_EQ(message(), "none");
}

TEST_F(TraceFiles, WhatIsNoFileIsRefused) {
  for (const char* file : {"manifest.json", "events.jsonl", "tensors-00000.safetensors"}) {
    copy(captured("llama"));
    fs::remove(folder_ / file);
    fs::create_directory(folder_ / file);
    EXPECT_NE(message().find("expected a regular file"), std::string::npos) << message();
    fs::remove(folder_ / file);
    ASSERT_EQ(::mkfifo((folder_ / file).c_str(), 0600), 0);
    EXPECT_NE(message().find("expected a regular file"), std::string::npos) << message();
  }
}

TEST_F(TraceFiles, AnEarlierTraceOutlivesAFailure) {
  copy(captured("llama"));
  const std::string before = contents("manifest.json");
  const TraceOptions good = follow(Trace::open(captured("llama")));
  const auto fails = [&](const std::function<void(TraceOptions&)>& change) {
    TraceOptions options = good;
    change(options);
    EXPECT_THROW(record_trace_to(folder_, model_of("llama"), options), Error);
    EXPECT_EQ(contents("manifest.json"), before);
    EXPECT_TRUE(fs::exists(folder_ / "floor.json"));
    EXPECT_NO_THROW(Trace::open(folder_));
    EXPECT_TRUE(alone());
  };
  fails([](TraceOptions& o) { o.fault = "typo"; });
  fails([](TraceOptions& o) { o.sequences[0].ids[0] = 1 << 30; });
  fails([](TraceOptions& o) { o.layers = {7, 8}; });
  fails([](TraceOptions& o) { o.model.isa = "none"; });
  fails([](TraceOptions& o) { o.sequences[1].fed.pop_back(); });
  record_trace_to(folder_, model_of("llama"), good);
  EXPECT_NE(contents("manifest.json"), before);
  EXPECT_FALSE(fs::exists(folder_ / "floor.json"));
  EXPECT_TRUE(alone());
}

TEST_F(TraceFiles, OtherFilesAreNotOverwritten) {
  const TraceOptions options = follow(Trace::open(captured("llama")));
  fs::create_directories(folder_);
  EXPECT_NO_THROW(record_trace_to(folder_, model_of("llama"), options)) << "an empty folder";
  fs::remove_all(folder_);
  fs::create_directories(folder_);
  write("manifest.json", R"({"name": "a web application"})");
  EXPECT_THROW(record_trace_to(folder_, model_of("llama"), options), Error);
  EXPECT_EQ(contents("manifest.json"), R"({"name": "a web application"})");
  EXPECT_TRUE(alone());
}

}  // namespace
}  // namespace lockstep

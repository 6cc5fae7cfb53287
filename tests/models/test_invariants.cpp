// Bit for bit: what logits do not depend on (design: numerics).
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "lockstep/error.h"
#include "lockstep/model.h"
#include "lockstep/session.h"
#include "lockstep/trace.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

using Ids = std::vector<int32_t>;

// Longer than a tile of attention (64 keys) and than every window of the fixtures.
constexpr int64_t kLength = 90;

Ids some_ids(int64_t count, uint32_t seed, int64_t vocab) {
  Ids ids;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525U + 1013904223U;
    ids.push_back(static_cast<int32_t>((seed >> 8) % static_cast<uint32_t>(vocab)));
  }
  return ids;
}

std::shared_ptr<const Model> load(const std::string& name, Precision precision, std::string_view isa,
                                  int threads, Packing packing = Packing::at_load) {
  ModelOptions options;
  options.precision = precision;
  options.isa = isa;
  options.threads = threads;
  options.packing = packing;
  return Model::load(test::data_path("models/" + name), options);
}

// The first rows of `actual` that `expected` has too are the same bytes.
testing::AssertionResult same(std::span<const float> actual, std::span<const float> expected) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(float)) != 0) {
      return testing::AssertionFailure() << "value " << i << ": " << actual[i] << " and " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

struct Case {
  std::string model;
  Precision precision;
  KvType kv;
  std::string isa;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.model << " " << precision_name(c.precision) << " " << kv_type_name(c.kv) << " " << c.isa;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const kernels::Table* table : kernels::available()) {
    for (const char* model :
         {"llama.gguf", "llama-k.mixed.gguf", "llama-q.mixed.gguf", "mistral", "mixtral-q.Q4_0.gguf",
          "mixtral", "mixtral-mlx-4bit", "qwen2-mlx-8bit", "qwen2-q.mixed.gguf"}) {
      all.push_back({model, Precision::exact, KvType::f16, std::string(table->isa)});
    }
    all.push_back({"llama-q.mixed.gguf", Precision::f32, KvType::f32, std::string(table->isa)});
    all.push_back({"llama-q.mixed.gguf", Precision::exact, KvType::q8, std::string(table->isa)});
    all.push_back({"mixtral-q.Q4_0.gguf", Precision::exact, KvType::f32, std::string(table->isa)});
    all.push_back({"llama-q.mixed.gguf", Precision::fast, KvType::f16, std::string(table->isa)});
    for (const char* model : {"llama-k.mixed.gguf", "mistral", "mixtral-q.Q4_0.gguf", "qwen2-mlx-8bit"})
      all.push_back({model, Precision::fast, KvType::i16, std::string(table->isa)});
  }
  return all;
}

class Invariants : public testing::TestWithParam<Case> {
 protected:
  Invariants()
      : model_(load(GetParam().model, GetParam().precision, GetParam().isa, 2)),
        ids_(some_ids(kLength, 7, model_->info().vocab)),
        expected_(session().append(ids_)) {}

  Session session(int64_t chunk = 256) const {
    SessionOptions options;
    options.kv_type = GetParam().kv;
    options.chunk = chunk;
    return Session(model_, options);
  }
  std::span<const float> last_row() const {
    return expected_.values().last(static_cast<size_t>(model_->info().vocab));
  }
  std::span<const int32_t> first(int64_t count) const {
    return std::span(ids_).first(static_cast<size_t>(count));
  }

  std::shared_ptr<const Model> model_;
  Ids ids_;
  Tensor expected_;  // [kLength, vocab]
};

TEST_P(Invariants, Threads) {
  for (const int threads : {1, 3}) {
    const auto other = load(GetParam().model, GetParam().precision, GetParam().isa, threads);
    SessionOptions options;
    options.kv_type = GetParam().kv;
    EXPECT_TRUE(same(Session(other, options).append(ids_).values(), expected_.values()))
        << threads << " threads";
  }
}

TEST_P(Invariants, Chunks) {
  for (const int64_t chunk : {1, 7, 32, 33, 64}) {
    EXPECT_TRUE(same(session(chunk).append(ids_).values(), expected_.values())) << "chunks of " << chunk;
    EXPECT_TRUE(same(session(chunk).sync(ids_).values(), last_row())) << "sync in chunks of " << chunk;
  }
}

// In pieces of `count`, each a pass of its own. -> all logits
std::vector<float> append_in_pieces(Session session, std::span<const int32_t> ids, size_t count) {
  std::vector<float> all;
  for (size_t begin = 0; begin < ids.size(); begin += count) {
    const Tensor logits = session.append(ids.subspan(begin, std::min(count, ids.size() - begin)));
    all.insert(all.end(), logits.values().begin(), logits.values().end());
  }
  return all;
}

TEST_P(Invariants, WhenWeightsArePacked) {
  SessionOptions options;
  options.kv_type = GetParam().kv;
  for (const auto& [threads, packing] :
       {std::pair{1, Packing::second_pass}, {2, Packing::second_pass}, {2, Packing::on_use}}) {
    for (const int64_t chunk : {7, 64, 256}) {
      options.chunk = chunk;
      const auto load_later = [&] {
        return load(GetParam().model, GetParam().precision, GetParam().isa, threads, packing);
      };
      const auto later = load_later();
      for (const char* pass : {"first", "second"}) {
        EXPECT_TRUE(same(append_in_pieces(Session(later, options), ids_, static_cast<size_t>(chunk)),
                         expected_.values()))
            << pass << " run in pieces of " << chunk << ", " << threads << " threads";
      }
      EXPECT_TRUE(same(Session(load_later(), options).append(ids_).values(), expected_.values()))
          << "in chunks of " << chunk << ", " << threads << " threads";
    }
  }
}

TEST_P(Invariants, WhenWeightsArePackedWhileSessionsRun) {
  const auto later = load(GetParam().model, GetParam().precision, GetParam().isa, 1, Packing::second_pass);
  SessionOptions options;
  options.kv_type = GetParam().kv;
  std::vector<std::vector<float>> results(3);
  {
    std::vector<std::jthread> threads;
    for (std::vector<float>& result : results)
      threads.emplace_back([&] { result = append_in_pieces(Session(later, options), ids_, 31); });
  }
  for (const std::vector<float>& result : results) EXPECT_TRUE(same(result, expected_.values()));
}

TEST_P(Invariants, Batches) {
  const int64_t vocab = model_->info().vocab;
  const std::vector<Ids> others = {some_ids(1, 3, vocab), ids_, some_ids(41, 5, vocab)};
  std::vector<Session> sessions;
  for (int i = 0; i < 3; ++i) sessions.push_back(session());
  const std::vector<Session*> pointers = {&sessions[0], &sessions[1], &sessions[2]};
  const std::vector<std::span<const int32_t>> parts(others.begin(), others.end());
  EXPECT_TRUE(same(append_together(pointers, parts)[1].values(), expected_.values()));
  // Decode together from here on, as one session alone would.
  const Ids more = some_ids(4, 11, vocab);
  Session alone = session();
  alone.append(ids_);
  for (const int32_t& id : more) {
    const std::span<const int32_t> step(&id, 1);
    const std::vector<std::span<const int32_t>> steps(3, step);
    EXPECT_TRUE(same(append_together(pointers, steps)[1].values(), alone.append(step).values()));
  }
}

TEST_P(Invariants, SessionsInThreadsOfTheirOwn) {
  std::vector<Tensor> results(3);
  {
    std::vector<std::jthread> threads;
    for (Tensor& result : results) {
      threads.emplace_back([this, &result] { result = session(7).append(ids_); });
    }
  }
  for (const Tensor& result : results) EXPECT_TRUE(same(result.values(), expected_.values()));
}

// Unobserved, the last layer's feed-forward computes the rows whose logits are wanted and no others.
TEST_P(Invariants, AnObserverSeesEveryRowAndChangesNothing) {
  struct : Observer {
    void observe(int layer, Site site, Tensor& tensor) override {
      if (site == Site::ffn_resid) rows[layer] += tensor.shape()[0];
    }
    std::map<int, int64_t> rows;
  } observer;
  Taps taps(&observer);
  EXPECT_TRUE(same(session(33).sync(ids_, taps).values(), last_row()));
  ASSERT_EQ(std::ssize(observer.rows), model_->info().layers);
  for (const auto& [layer, rows] : observer.rows) EXPECT_EQ(rows, kLength) << "layer " << layer;
}

// Keys and values, scores and probabilities: who asks for one of two need not ask for the other.
TEST_P(Invariants, EitherOfTwoInnerSitesCanBeChanged) {
  struct Changes : Observer {
    explicit Changes(Site site) : site(site) {}
    void observe(int, Site at, Tensor& tensor) override {
      if (at != site) return;
      ++seen;
      std::ranges::fill(tensor.values(), 0.0F);
    }
    Interest inner(Site at) const override { return at == site ? Interest::change : Interest::none; }
    Site site;
    int64_t seen = 0;
  };
  for (const Site site : {Site::k_cache, Site::v_cache, Site::scores, Site::probs}) {
    Changes observer(site);
    Taps taps(&observer);
    EXPECT_FALSE(same(session().append(ids_, taps).values(), expected_.values())) << site_name(site);
    EXPECT_EQ(observer.seen, model_->info().layers) << site_name(site);
  }
}

TEST_P(Invariants, ReusedPrefix) {
  for (const int64_t kept : {1, 31, 64, 89}) {
    Session warm = session();
    Ids other = some_ids(kLength, 13, model_->info().vocab);
    std::copy_n(ids_.begin(), kept, other.begin());
    warm.sync(other);
    EXPECT_TRUE(same(warm.sync(ids_).values(), last_row())) << "after a shared prefix of " << kept;
  }
}

TEST_P(Invariants, RewindAndFork) {
  Session whole = session();
  whole.append(ids_);
  Session copy = whole.fork();
  whole.rewind(40);
  EXPECT_TRUE(same(whole.sync(ids_).values(), last_row())) << "after a rewind";
  const Ids next = {ids_[3]};
  EXPECT_TRUE(same(copy.append(next).values(), whole.append(next).values())) << "after a fork";
  copy.rewind(20);
  EXPECT_EQ(copy.length(), 20);
  EXPECT_EQ(whole.length(), kLength + 1) << "a fork is a timeline of its own";
}

TEST_P(Invariants, ComparisonSeesOneBit) {
  std::vector<float> damaged(expected_.values().begin(), expected_.values().end());
  damaged[100] = std::nextafter(damaged[100], 1e30F);
  EXPECT_FALSE(same(damaged, expected_.values()));
}

INSTANTIATE_TEST_SUITE_P(Models, Invariants, testing::ValuesIn(cases()), [](const auto& info) {
  const Case& c = info.param;
  std::string name = c.model + "_" + std::string(precision_name(c.precision)) + "_" +
                     std::string(kv_type_name(c.kv)) + "_" + c.isa;
  for (char& letter : name) letter = std::isalnum(letter) != 0 ? letter : '_';
  return name;
});

// The same weights from another layout of files.
TEST(Twins, FoldersAndGgufFilesAgree) {
  const std::vector<std::pair<const char*, const char*>> twins = {
      {"llama", "llama.gguf"},    {"mixtral", "mixtral.gguf"},           {"mixtral", "mixtral-split.gguf"},
      {"qwen2", "qwen2.gguf"},    {"llama-linear", "llama-linear.gguf"}, {"llama-yarn", "llama-yarn.gguf"},
      {"mixtral", "mixtral-mlx"},
  };
  for (const kernels::Table* table : kernels::available()) {
    for (const Precision precision : {Precision::f32, Precision::exact}) {
      for (const auto& [folder, twin] : twins) {
        const auto one = load(folder, precision, table->isa, 2);
        const auto two = load(twin, precision, table->isa, 2);
        const Ids ids = some_ids(kLength, 17, one->info().vocab);
        EXPECT_TRUE(same(Session(one).append(ids).values(), Session(two).append(ids).values()))
            << folder << " and " << twin << " on " << table->isa;
      }
    }
  }
}

class PackedLater : public testing::Test {
 protected:
  PackedLater() {
    std::filesystem::create_directories(folder_);
    std::filesystem::copy_file(test::data_path("models/llama-q.mixed.gguf"), file_,
                               std::filesystem::copy_options::overwrite_existing);
    options_.threads = 1;
    options_.packing = Packing::second_pass;
    options_.progress = [this](double share) { shares_.push_back(share); };
    model_ = Model::load(file_, options_);
  }
  ~PackedLater() override { std::filesystem::remove_all(folder_); }

  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("lockstep-packed-later-" + std::to_string(::getpid()));
  const std::filesystem::path file_ = folder_ / "model.gguf";
  ModelOptions options_;
  std::vector<double> shares_;
  std::shared_ptr<const Model> model_;
  const Ids ids_ = {3, 5, 7};
};

TEST_F(PackedLater, TheFirstPassReads) {
  EXPECT_TRUE(shares_.empty()) << "nothing is read at load";
  Session session(model_);
  session.append(ids_);
  ASSERT_GT(shares_.size(), 2U);
  EXPECT_TRUE(std::ranges::is_sorted(shares_));
  EXPECT_LT(shares_.front(), 0.5);
  EXPECT_EQ(shares_.back(), 1.0);
  shares_.clear();
  session.append(ids_);
  EXPECT_TRUE(shares_.empty()) << "a reply may be on the screen";
}

TEST_F(PackedLater, OnUseNothingIsReadAtLoad) {
  shares_.clear();
  options_.packing = Packing::on_use;
  Session session(Model::load(file_, options_));
  EXPECT_TRUE(shares_.empty());
  session.append(ids_);
  ASSERT_FALSE(shares_.empty());
  EXPECT_EQ(shares_.back(), 1.0);
}

TEST_F(PackedLater, TheThirdPassNeedsNoFile) {
  Session session(model_);
  session.append(ids_);
  session.append(ids_);
  std::filesystem::resize_file(file_, 100);
  EXPECT_NO_THROW(session.append(ids_));
}

TEST_F(PackedLater, AFileThatEndsTooSoonIsAnError) {
  Session session(model_);
  std::filesystem::resize_file(file_, std::filesystem::file_size(file_) / 2);
  try {
    session.append(ids_);
    FAIL() << "nothing noticed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::io);
    EXPECT_NE(std::string(error.what()).find("model.gguf"), std::string::npos) << error.what();
  }
  EXPECT_EQ(session.length(), 0);
}

TEST(Isa, RunsWhatIsAskedFor) {
  for (const kernels::Table* table : kernels::available()) {
    EXPECT_EQ(load("llama", Precision::exact, table->isa, 1)->isa(), table->isa);
  }
  EXPECT_THROW(load("llama", Precision::exact, "mmx", 1), Error);
}

}  // namespace
}  // namespace lockstep

// Experts of nearly equal logits: choices that may fall either way.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <numeric>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"

namespace lockstep {
namespace {

using test::captured;
using test::edited;
using test::follow;
using test::model_of;

struct Mixtral {
  Trace reference = Trace::open(captured("mixtral"));
  Floor floor{captured("mixtral") / "floor.json", "fast/f16"};

  TraceOptions options() const {
    TraceOptions options = follow(reference, floor);
    options.model.precision = Precision::fast;
    options.kv_type = KvType::f16;
    return options;
  }
};

// A reference whose router decided one row otherwise: the second and the third of its logits exchanged, and
// their weights.
Trace decided_otherwise(const Trace& reference, int layer, int64_t position) {
  size_t second = 0, third = 0;
  return edited(reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 0 || event.row != 0 || event.layer != layer || event.axes != "T E") return true;
    const auto experts = static_cast<size_t>(event.shape[1]);
    float* row = values.data() + static_cast<size_t>(position) * experts;
    if (event.site == "router_logits") {
      std::vector<size_t> order(experts);
      std::iota(order.begin(), order.end(), 0);
      std::ranges::sort(order, std::greater<>(), [&](size_t e) { return row[e]; });
      second = order[1], third = order[2];
    }
    std::swap(row[second], row[third]);
    return true;
  });
}

double margin_of(const Trace& reference, int layer, int64_t position) {
  for (const TraceEvent& event : reference.events()) {
    if (event.step != 0 || event.row != 0 || event.layer != layer || event.site != "router_logits") continue;
    const auto experts = static_cast<size_t>(event.shape[1]);
    const auto row = event.values.subspan(static_cast<size_t>(position) * experts, experts);
    std::vector<float> sorted(row.begin(), row.end());
    std::ranges::sort(sorted, std::greater<>());
    double size = 0;
    for (const float x : row) size += static_cast<double>(x) * x;
    return (sorted[1] - sorted[2]) / std::sqrt(size);  // two experts a token
  }
  return NAN;
}

TEST(Ties, AreSettledAsTheReferenceDecided) {
  const Mixtral mixtral;
  int settled = 0, kept = 0;
  for (int64_t position = 0; position < 13; ++position) {
    const double bound = 16 * std::min(0.5 / 16, mixtral.floor.at(false, "L01.router_logits", 4));
    const double margin = margin_of(mixtral.reference, 1, position);
    if (std::abs(margin - bound) < 0.2 * bound) continue;
    const Trace other = decided_otherwise(mixtral.reference, 1, position);
    TraceOptions options = mixtral.options();
    options.ties = {&other, &mixtral.floor};
    const Trace ours = record_trace(model_of("mixtral"), options);
    const auto tie = std::ranges::find_if(ours.ties, [&](const Trace::Tie& each) {
      return each.layer == 1 && each.step == 0 && each.row == 0 && each.position == position;
    });
    EXPECT_EQ(tie != ours.ties.end(), margin < bound) << position << ": " << margin << " of " << bound;
    ++(margin < bound ? settled : kept);
    if (tie == ours.ties.end()) continue;
    EXPECT_EQ(tie->experts.size(), 2U);
    // By the floor of f32 it is none; and what was computed on with the reference's choice clears no
    // reference.
    const Floor strict(captured("mixtral") / "floor.json", "f32/f32");
    Trace declared = ours;
    declared.precision = "f32";
    declared.kv_type = "f32";
    EXPECT_NE(diff(declared, other, strict).verdict, Verdict::within);
  }
  EXPECT_GT(settled, 0);
  EXPECT_GT(kept, 0);
}

TEST(Ties, AreWrittenAndRead) {
  const Mixtral mixtral;
  Trace ours = record_trace(model_of("mixtral"), mixtral.options());
  ours.ties = {{1, 0, 1, 13, {0, 3}}};
  const auto folder = std::filesystem::path(testing::TempDir()) / ("ties-" + std::to_string(::getpid()));
  ours.save(folder);
  const Trace read = Trace::open(folder);
  std::filesystem::remove_all(folder);
  ASSERT_EQ(read.ties.size(), 1U);
  EXPECT_EQ(read.ties[0].position, 13);
  EXPECT_EQ(read.ties[0].experts, (std::vector<int>{0, 3}));
}

TEST(Ties, ThatCannotBeAreRefused) {
  const Mixtral mixtral;
  Trace ours = record_trace(model_of("mixtral"), mixtral.options());
  const auto folder = std::filesystem::path(testing::TempDir()) / ("no-ties-" + std::to_string(::getpid()));
  const Trace::Tie good{0, 0, 1, 3, {0, 3}};
  const auto refused = [&](const std::function<void(Trace::Tie&)>& change) {
    ours.ties = {good};
    change(ours.ties[0]);
    ours.save(folder);
    EXPECT_THROW(Trace::open(folder), Error);
  };
  refused([](auto& tie) { tie.step = -1; });
  refused([](auto& tie) { tie.step = 9; });
  refused([](auto& tie) { tie.row = 99; });
  refused([](auto& tie) { tie.row = -1; });
  refused([](auto& tie) { tie.layer = 2; });
  refused([](auto& tie) { tie.layer = -1; });
  refused([](auto& tie) { tie.position = 999; });
  refused([](auto& tie) { tie.position = -5; });
  for (const auto& experts : {std::vector<int>{}, {1, 1}, {0, 99}, {3, 0}, {-1, 2}})
    refused([&](auto& tie) { tie.experts = experts; });
  ours.ties = {good, good};
  ours.save(folder);
  EXPECT_THROW(Trace::open(folder), Error);
  std::filesystem::remove_all(folder);
}

// The third expert in the place of the second, against the subject's own logits: no tie, however coarse the
// floor.
TEST(Ties, AreOfTheSubjectsOwnLogits) {
  const Mixtral mixtral;
  const Trace ours = record_trace(model_of("mixtral"), mixtral.options());
  const Trace wrong = decided_otherwise(ours, 1, 8);  // the smallest margin
  std::vector<std::vector<float>> own;
  for (const TraceEvent& event : ours.events())
    if (event.site == "router_logits") own.emplace_back(event.values.begin(), event.values.end());
  size_t at = 0;
  const Trace subject = edited(wrong, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.site == "router_logits") values = own.at(at++);
    return true;
  });
  Trace judged = subject;
  judged.precision = "fast";
  judged.kv_type = "f16";
  const DiffReport report = diff(judged, mixtral.reference, mixtral.floor);
  EXPECT_NE(report.verdict, Verdict::within) << report.reason;
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L01.router_weights");
}

// A reference that chose against its own logits is damaged.
TEST(Ties, OfAReferenceAreOfItsOwnLogits) {
  const Mixtral mixtral;
  const Trace damaged = edited(mixtral.reference, [](TraceEvent& event, std::vector<float>& values) {
    if (event.step == 0 && event.row == 0 && event.name() == "L01.router_weights")
      std::reverse(values.begin(), values.begin() + event.shape[1]);
    return true;
  });
  TraceOptions options = mixtral.options();
  options.ties = {&damaged, &mixtral.floor};
  const Trace ours = record_trace(model_of("mixtral"), options);
  EXPECT_TRUE(std::ranges::none_of(ours.ties, [](const Trace::Tie& tie) {
    return tie.step == 0 && tie.row == 0 && tie.layer == 1 && tie.position == 0;
  }));
  const DiffReport report = diff(ours, damaged, mixtral.floor);
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("chooses others than its router_logits"), std::string::npos) << report.reason;
}

// Choices that the reference's logits do not call ties are errors of the weights, though what follows agrees.
TEST(Ties, ThatAreNoneAreErrors) {
  const Mixtral mixtral;
  Trace ours = record_trace(model_of("mixtral"), mixtral.options());
  ASSERT_EQ(diff(ours, mixtral.reference, mixtral.floor).verdict, Verdict::within);
  int errors = 0;
  for (int64_t position = 0; position < 13; ++position) {
    for (const TraceEvent& event : mixtral.reference.events()) {
      if (event.name() != "L01.router_weights" || event.step != 0 || event.row != 0) continue;
      std::vector<int> others;
      for (int e = 0; e < 4; ++e)
        if (event.values[static_cast<size_t>(4 * position + e)] == 0) others.push_back(e);
      ours.ties = {{0, 0, 1, position, others}};
    }
    const DiffReport report = diff(ours, mixtral.reference, mixtral.floor);
    if (report.verdict != Verdict::divergent) continue;
    ++errors;
    EXPECT_EQ(report.first->name(), "L01.router_weights");
    EXPECT_EQ(report.first->token, position);
  }
  EXPECT_GT(errors, 3);
}

}  // namespace
}  // namespace lockstep

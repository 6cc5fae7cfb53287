// Experts of nearly equal logits: choices that may fall either way.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "lockstep/divergence.h"
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

// A reference whose router decided one row otherwise: its last chosen expert exchanged for the best of the others.
Trace decided_otherwise(const Trace& reference, int layer, int64_t position) {
  std::vector<float> logits;
  return edited(reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 0 || event.row != 0 || event.layer != layer) return true;
    const auto experts = static_cast<size_t>(event.shape[1]);
    const auto row = static_cast<ptrdiff_t>(static_cast<size_t>(position) * experts);
    if (event.site == "router_logits")
      logits.assign(values.begin() + row, values.begin() + row + static_cast<ptrdiff_t>(experts));
    if (event.site != "router_weights") return true;
    size_t out = experts, in = experts;
    float* weights = values.data() + row;
    for (size_t e = 0; e < experts; ++e) {
      if (weights[e] != 0 && (out == experts || logits[e] < logits[out])) out = e;
      if (weights[e] == 0 && (in == experts || logits[e] > logits[in])) in = e;
    }
    std::swap(weights[out], weights[in]);
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
    // By the floor of f32 it is none; and what was computed on with the reference's choice clears no reference.
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
  const auto folder =
      std::filesystem::path(testing::TempDir()) / ("ties-" + std::to_string(::getpid()));
  ours.save(folder);
  const Trace read = Trace::open(folder);
  std::filesystem::remove_all(folder);
  ASSERT_EQ(read.ties.size(), 1U);
  EXPECT_EQ(read.ties[0].position, 13);
  EXPECT_EQ(read.ties[0].experts, (std::vector<int>{0, 3}));
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

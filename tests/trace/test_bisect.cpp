// From layers to the operation that is wrong, and how many layers are.
#include <gtest/gtest.h>

#include <algorithm>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"

namespace lockstep {
namespace {

using test::captured;
using test::follow;
using test::model_of;

DiffReport bisected(const std::string& fault, bool graft) {
  const Trace reference = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  TraceOptions options = follow(reference);
  options.fault = fault;
  return bisect(model_of("mixtral"), options, reference, floor, graft);
}

bool notes(const DiffReport& report, const std::string& part) {
  return std::ranges::any_of(report.notes,
                             [&](const std::string& each) { return each.find(part) != std::string::npos; });
}

TEST(Bisect, CleanRunsAreWithin) {
  const DiffReport report = bisected("", true);
  EXPECT_EQ(report.verdict, Verdict::within) << report.reason;
  EXPECT_EQ(report.compared, report.expected);
  EXPECT_EQ(report.compared, (1 + 2 * 2 + 2) * 4 * 2);  // boundaries, passes, sequences
}

TEST(Bisect, NamesTheOperationOfTheFirstWrongLayer) {
  for (const char* layer : {"0", "1"}) {
    const DiffReport report = bisected(std::string("rope-flatten-heads@layer=") + layer, true);
    ASSERT_TRUE(report.first) << report.reason;
    EXPECT_EQ(report.first->name(), std::string("L0") + layer + ".q_rope");
    EXPECT_EQ(report.first->step, 1);
    EXPECT_TRUE(notes(report, std::string("layer ") + layer + " is the only one that is wrong"));
  }
}

TEST(Bisect, GraftsTellSeveralFaultsFromOne) {
  EXPECT_TRUE(notes(bisected("rope-flatten-heads", true), "several faults: layer 1 is the last"));
  EXPECT_FALSE(notes(bisected("rope-flatten-heads", false), "grafted"));
  TraceOptions options;
  Trace reduced = Trace::open(captured("mixtral"));
  reduced.storage = parse_storage("sample:8", 0);
  EXPECT_THROW(bisect(model_of("mixtral"), options, reduced, Floor(), true), Error);
}

TEST(Bisect, FaultsOutsideLayersNeedNoSecondLook) {
  const DiffReport report = bisected("embedding-scale", true);
  ASSERT_TRUE(report.first) << report.reason;
  EXPECT_EQ(report.first->layer, kNoLayer);
}

}  // namespace
}  // namespace lockstep

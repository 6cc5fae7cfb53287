// Traces of other engines, broken and reduced ones, judged against transformers.
#include <gtest/gtest.h>

#include <algorithm>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"
#include "trace/compare.h"

namespace lockstep {
namespace {

using test::captured;
using test::edited;
using test::follow;
using test::model_of;
using test::subject;

DiffReport judged(const std::string& name, const std::string& reference, const std::string& policy) {
  return diff(Trace::open(subject(name)), Trace::open(captured(reference)),
              Floor(captured(reference) / "floor.json", policy));
}

TEST(Subjects, RoundingOfLlamaCppIsNamedAndSized) {
  const DiffReport declared = judged("llama.cpp", "llama-q.Q4_1.gguf", "q8/f16");
  EXPECT_EQ(declared.verdict, Verdict::within) << declared.reason;
  EXPECT_EQ(declared.compared, declared.expected);
  ASSERT_FALSE(declared.notes.empty());
  const std::string& note = declared.notes.back();
  EXPECT_NE(note.find("rounded to 8 bits per block of 32"), std::string::npos) << note;
  EXPECT_NE(note.find("shows first in L00.q_proj: error 0.0"), std::string::npos) << note;

  const DiffReport strict = judged("llama.cpp", "llama-q.Q4_1.gguf", "f32/f32");
  EXPECT_EQ(strict.verdict, Verdict::divergent);
  EXPECT_EQ(strict.first->name(), "L00.q_proj");
  EXPECT_TRUE(strict.hints.at(0).starts_with("rounding as in q8/f16")) << strict.hints.at(0);
  EXPECT_NE(strict.hints.at(0).find("every site is within it"), std::string::npos);
}

TEST(Subjects, MlxLmLeavesTheWindowOut) {
  const DiffReport report = judged("mlx-lm", "mistral", "f32/f32");
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L00.attn_ctx");
  EXPECT_EQ(report.first->first_bad, 9);  // the window
}

TEST(Subjects, TheSidesOfABrokenTransformersAreToldApart) {
  const Trace broken = Trace::open(subject("broken-transformers"));
  const Trace sound = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  const DiffReport report = diff(broken, sound, floor);
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L00.q_rope");
  EXPECT_EQ(report.first->step, 1);
  EXPECT_EQ(report.first->bad_heads, (std::vector<int>{1, 2, 3, 4, 5}));

  const Trace ours = record_trace(model_of("mixtral"), follow(broken));
  const DiffReport alone = diff(ours, broken, sound, floor);
  EXPECT_EQ(alone.verdict, Verdict::inconclusive);
  EXPECT_NE(alone.reason.find("disagree with each other at L00.q_rope of step 1"), std::string::npos)
      << alone.reason;
  EXPECT_TRUE(
      alone.reason.ends_with("the first (" + broken.engine + ", " + broken.where + ") stands alone there"))
      << alone.reason;
  // With the parts changed the sound one is not blamed, and a faulty engine is.
  const DiffReport faulty = diff(broken, sound, ours, floor);
  EXPECT_EQ(faulty.verdict, Verdict::divergent);
  EXPECT_EQ(faulty.first->name(), "L00.q_rope");
  ASSERT_FALSE(faulty.notes.empty());
}

// What the references agree on before they part stands.
TEST(Subjects, AFaultBeforeTheReferencesPartIsNamed) {
  const Trace broken = Trace::open(subject("broken-transformers"));
  const Trace sound = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  TraceOptions options = follow(sound);
  options.fault = "gqa-tiled";
  const DiffReport report = diff(record_trace(model_of("mixtral"), options), sound, broken, floor);
  EXPECT_EQ(report.verdict, Verdict::divergent);
  EXPECT_EQ(report.first->name(), "L00.scores");
  EXPECT_TRUE(report.notes.back().find("part later: at L00.q_rope of step 1") != std::string::npos)
      << report.notes.back();
}

// What Python kept of each row, against the same of our trace.
TEST(Subjects, ReducedTracesAreComparedWithWholeOnes) {
  const Trace whole = Trace::open(captured("llama"));
  const Floor floor(captured("llama") / "floor.json", "f32/f32");
  TraceOptions options = follow(whole);
  const Trace ours = record_trace(model_of("llama"), options);
  options.fault = "rope-flatten-heads";
  const Trace faulty = record_trace(model_of("llama"), options);
  for (const char* kind : {"sample", "sketch"}) {
    const Trace reduced = Trace::open(subject(kind));
    EXPECT_EQ(reduced.storage.count, 8);
    const auto mine = join(whole, reduced.storage);
    for (const auto& [place, joined] : join(reduced)) {
      const Joined& same = mine.at(place);
      ASSERT_TRUE(same_rows(same, joined)) << kind << " " << joined.event->name();
      for (const auto& [position, row] : joined.rows)
        EXPECT_LE(relative(same.rows.at(position), row, 0), kind == std::string("sample") ? 0 : 1e-6)
            << kind << " " << joined.event->name();
    }
    EXPECT_EQ(diff(ours, reduced, floor).verdict, Verdict::within) << kind;
    const DiffReport report = diff(faulty, reduced, floor);
    ASSERT_TRUE(report.first) << kind;
    EXPECT_EQ(report.first->name(), "L00.q_rope") << kind;
    EXPECT_EQ(report.first->step, 1) << kind;
    // Other columns cannot be compared.
    Trace other = Trace::open(subject(kind));
    other.storage.seed = 6;
    EXPECT_EQ(diff(other, reduced, floor).verdict, Verdict::inconclusive);
  }
}

TEST(Subjects, RowsOfOtherPositionsAreNotCompared) {
  const Trace sound = Trace::open(captured("llama"));
  const Trace moved = edited(sound, [](TraceEvent& event, std::vector<float>&) {
    if (event.site == "q_rope" && event.layer == 1) event.first_position += 100;
    return true;
  });
  const DiffReport report = diff(moved, sound, Floor(captured("llama") / "floor.json", "f32/f32"));
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  const std::string& why = report.unmatched.at(0).why;
  EXPECT_NE(why.find("from position 100"), std::string::npos) << why;
}

TEST(Subjects, ChunksOfAPrefillAreOnePrefill) {
  const Trace reference = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  for (const int64_t chunk : {1, 5, 12, 13, 14}) {
    TraceOptions options = follow(reference);
    options.chunk = chunk;
    const DiffReport report = diff(record_trace(model_of("mixtral"), options), reference, floor);
    EXPECT_EQ(report.verdict, Verdict::within) << chunk << ": " << report.reason;
    EXPECT_TRUE(report.unmatched.empty()) << report.unmatched.at(0).text();
  }
}

TEST(Subjects, OneLayerAlone) {
  const Trace reference = Trace::open(captured("mixtral"));
  TraceOptions options = follow(reference);
  options.layers = {1, 1};
  const Trace ours = record_trace(model_of("mixtral"), options);
  ASSERT_FALSE(ours.events().empty());
  for (const TraceEvent& event : ours.events()) EXPECT_EQ(event.layer, 1);
  EXPECT_EQ(diff(ours, reference, Floor()).verdict, Verdict::inconclusive);
}

}  // namespace
}  // namespace lockstep

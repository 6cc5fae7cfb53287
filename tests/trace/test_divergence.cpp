// Traces, their comparison, and what must not be concluded from damaged ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/kernels.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/fixtures.h"
#include "support/traces.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::captured;
using test::edited;
using test::follow;
using test::model_of;

TEST(Selftest, FindsEveryFaultWhereItIs) {
  const SelftestResult result = selftest(test::data_path(""));
  for (const auto& each : result.cases) {
    EXPECT_TRUE(each.fault.empty() || !each.can_act ? !each.detected : each.localised)
        << each.fault << (each.can_act ? " in " : ", which cannot act, in ") << each.model << ": "
        << each.outcome;
  }
  EXPECT_EQ(result.faults, static_cast<int64_t>(faults().size()));
  EXPECT_EQ(result.detected, 1);
  EXPECT_GE(result.localised, 0.95);
  EXPECT_GE(result.clean_runs, 200);
  EXPECT_EQ(result.false_alarms, 0);
  std::printf("%lld faults, detected %.3f, localised %.3f, %lld clean runs, %lld false alarms\n",
              static_cast<long long>(result.faults), result.detected, result.localised,
              static_cast<long long>(result.clean_runs), static_cast<long long>(result.false_alarms));
}

TEST(Selftest, FaultsOfOneLayerAreFoundThere) {
  const Trace reference = Trace::open(captured("llama"));
  const Floor floor(captured("llama") / "floor.json", "f32/f32");
  int found = 0;
  for (const Fault& fault : faults()) {
    TraceOptions options = follow(reference);
    if (fault.site == "embed" || fault.site == "logits" || cannot_act(fault, model_of("llama"), options))
      continue;
    options.fault = fault.name + "@layer=1";
    Trace trace;
    try {
      trace = record_trace(model_of("llama"), options);
    } catch (const Error&) {
      continue;  // a change of the config, which has no layer
    }
    const DiffReport report = diff(trace, reference, floor);
    ASSERT_TRUE(report.first) << fault.name;
    EXPECT_EQ(report.first->layer, 1) << fault.name;
    const bool inner = fault.site == "scores";  // not recorded at level 2
    EXPECT_EQ(report.first->site, inner ? "attn_ctx" : fault.site) << fault.name;
    ++found;
  }
  EXPECT_GE(found, 12);
  for (const char* wrong : {"gelu@", "gelu@layer=", "gelu@layer=x", "gelu@head=1", "gelu@head=2-1",
                            "gelu@layer=1,", "gelu@layer=1,2", "rope-theta@layer=1"}) {
    EXPECT_THROW(find_fault(wrong), Error) << wrong;
  }
}

TEST(Selftest, FaultsOfOneHeadAreFoundThere) {
  const Trace reference = Trace::open(captured("llama"));
  const Floor floor(captured("llama") / "floor.json", "f32/f32");
  TraceOptions options = follow(reference);
  options.fault = "rope-half-the-dims@layer=1,head=2-3";
  const DiffReport report = diff(record_trace(model_of("llama"), options), reference, floor);
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L01.q_rope");
  EXPECT_EQ(report.first->bad_heads, (std::vector<int>{2, 3}));
}

TEST(Selftest, FaultsCoverTheCatalogue) {
  std::set<int> kinds;
  for (const Fault& fault : faults()) kinds.insert(fault.kind);
  EXPECT_GE(kinds.size(), 18U);
  EXPECT_THROW(find_fault("no-such-fault"), Error);
}

// Every declared policy against the floor whose variants include its rounding.
TEST(Diff, CleanRunsOfEveryPolicyRaiseNoAlarm) {
  int runs = 0;
  for (const auto& entry : fs::directory_iterator(captured(""))) {
    const std::string name = entry.path().filename().string();
    const Trace reference = Trace::open(entry.path());
    for (const auto& [precision, kv] : {std::pair(Precision::f32, KvType::f32),
                                        {Precision::f32, KvType::f16},
                                        {Precision::exact, KvType::f32},
                                        {Precision::exact, KvType::f16},
                                        {Precision::fast, KvType::f32},
                                        {Precision::fast, KvType::f16},
                                        {Precision::fast, KvType::i16}}) {
      const std::string policy = std::string(precision_name(precision)) + "/" + std::string(kv_type_name(kv));
      const Floor floor(entry.path() / "floor.json", policy);
      for (const kernels::Table* table : kernels::available()) {
        for (const int threads : {1, 2, 3}) {
          TraceOptions options = follow(reference, floor);
          options.model.precision = precision;
          options.model.isa = table->isa;
          options.model.threads = threads;
          options.kv_type = kv;
          const DiffReport report = diff(record_trace(model_of(name), options), reference, floor);
          EXPECT_EQ(report.verdict, Verdict::within)
              << name << " " << policy << " " << table->isa << ": " << report.reason;
          EXPECT_EQ(report.compared, report.expected) << name << " " << policy << " " << table->isa;
          ++runs;
        }
      }
    }
  }
  std::printf("%d clean runs\n", runs);
}

TEST(Diff, DamagedReferencesGiveNoVerdict) {
  const Trace reference = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  const Trace ours = record_trace(model_of("mixtral"), follow(reference));
  ASSERT_EQ(diff(ours, reference, floor).verdict, Verdict::within);
  const auto verdict = [&](const std::function<bool(TraceEvent&, std::vector<float>&)>& edit) {
    const DiffReport report = diff(ours, edited(reference, edit), floor);
    EXPECT_FALSE(report.reason.empty());
    return report.verdict;
  };
  for (const float factor : {1.001F, 0.999F}) {
    for (const char* site : {"attn_norm", "q_proj", "q_rope", "attn_ctx", "moe_out", "ffn_resid"}) {
      EXPECT_EQ(verdict([&](TraceEvent& event, std::vector<float>& values) {
                  if (event.layer == 1 && event.site == site) {
                    for (float& v : values) v *= factor;
                  }
                  return true;
                }),
                Verdict::inconclusive)
          << site << " scaled";
    }
  }
  std::map<std::string, std::vector<float>> layer_0;
  EXPECT_EQ(verdict([&](TraceEvent& event, std::vector<float>& values) {
              const std::string key = std::to_string(event.step) + std::to_string(event.row) + event.site;
              if (event.layer == 0) layer_0[key] = values;
              if (event.layer == 1) values = layer_0[key];
              return true;
            }),
            Verdict::inconclusive)
      << "a layer recorded twice";
  EXPECT_EQ(verdict([](TraceEvent& event, std::vector<float>&) {
              return event.layer != 1 || event.site != "k_rope";
            }),
            Verdict::inconclusive)
      << "a site is missing";
  EXPECT_EQ(verdict([](TraceEvent& event, std::vector<float>& values) {
              if (event.layer == 1 && event.site == "q_proj")
                values[3] = std::numeric_limits<float>::quiet_NaN();
              return true;
            }),
            Verdict::inconclusive)
      << "NaN";
  // Weights that are not the same ones.
  Trace stale = edited(reference, [](TraceEvent&, std::vector<float>&) { return true; });
  stale.weights_sha256["model.safetensors"] = "0";
  TraceOptions options = follow(reference);
  options.checksums = true;
  EXPECT_EQ(diff(record_trace(model_of("mixtral"), options), stale, floor).verdict, Verdict::inconclusive);
}

// From disk on both sides, as diff runs.
TEST(Diff, OtherWeightsAreSeenBeforeAnyTensor) {
  const fs::path folder = fs::path(testing::TempDir()) / ("weights-" + std::to_string(::getpid()));
  const Trace reference = Trace::open(captured("mixtral"));
  TraceOptions options = follow(reference);
  options.checksums = true;
  record_trace_to(folder, model_of("mixtral"), options);
  EXPECT_EQ(diff(Trace::open(folder), reference, Floor()).reason.find("the weights differ"),
            std::string::npos);
  std::ifstream stream(folder / "manifest.json");
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  const size_t sum = text.find("model.safetensors\": \"") + 21;
  text[sum] = text[sum] == '0' ? '1' : '0';
  std::ofstream(folder / "manifest.json") << text;
  const DiffReport report = diff(Trace::open(folder), reference, Floor());
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_EQ(report.reason, "the weights differ: model.safetensors");
  fs::remove_all(folder);
}

// What an earlier trace left in the folder, its floor above all, is no part of the new one.
TEST(Traces, LeaveNothingOfAnEarlierOne) {
  const fs::path folder = fs::path(testing::TempDir()) / ("again-" + std::to_string(::getpid()));
  fs::create_directories(folder);
  fs::copy(captured("mixtral"), folder, fs::copy_options::recursive);
  std::ofstream(folder / "tensors-00007.safetensors").close();
  std::ofstream(folder / "notes.txt") << "mine";
  TraceOptions options = follow(Trace::open(captured("mixtral")));
  record_trace_to(folder, model_of("mixtral"), options);
  EXPECT_FALSE(fs::exists(folder / "floor.json"));
  EXPECT_FALSE(fs::exists(folder / "tensors-00007.safetensors"));
  EXPECT_TRUE(fs::exists(folder / "notes.txt"));
  EXPECT_NO_THROW(Trace::open(folder));
  fs::remove_all(folder);
}

// A writer that was killed leaves its folder beside the trace; the next one sweeps it.
TEST(Traces, SweepWhatAKilledWriterLeft) {
  const fs::path folder = fs::path(testing::TempDir()) / ("swept-" + std::to_string(::getpid()));
  const auto beside = [&](const std::string& writer) {
    return fs::path(folder.string() + ".partial-" + writer);
  };
  const pid_t ended = ::fork();
  if (ended == 0) ::_exit(0);
  ::waitpid(ended, nullptr, 0);
  const fs::path dead = beside(std::to_string(ended)), alive = beside("1"), other = beside("mine");
  for (const fs::path& each : {dead, alive, other}) fs::create_directories(each);
  record_trace_to(folder, model_of("llama"), follow(Trace::open(captured("llama"))));
  EXPECT_FALSE(fs::exists(dead));
  EXPECT_TRUE(fs::exists(alive)) << "its writer is at work";
  EXPECT_TRUE(fs::exists(other));
  for (const fs::path& each : {folder, alive, other}) fs::remove_all(each);
}

TEST(Faults, PlacesThatTheModelLacksAreRefused) {
  TraceOptions options = follow(Trace::open(captured("llama")));
  for (const char* fault : {"rope-flatten-heads@layer=77", "rope-flatten-heads@head=99"}) {
    options.fault = fault;
    EXPECT_THROW(record_trace(model_of("llama"), options), Error) << fault;
  }
}

TEST(Diff, OtherTokensAreSeenBeforeAnyTensor) {
  const Trace reference = Trace::open(captured("llama"));
  TraceOptions options = follow(reference);
  options.sequences[0].ids.insert(options.sequences[0].ids.begin(), options.sequences[0].ids[0]);
  const DiffReport report = diff(record_trace(model_of("llama"), options), reference, Floor());
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("token ids"), std::string::npos) << report.reason;
}

TEST(Diff, LayoutsAreFindings) {
  const Trace reference = Trace::open(captured("llama"));
  const Floor floor(captured("llama") / "floor.json", "f32/f32");
  TraceOptions options = follow(reference);
  options.fault = "qk-not-unpermuted";
  const DiffReport report = diff(record_trace(model_of("llama"), options), reference, floor);
  ASSERT_TRUE(report.first);
  EXPECT_FALSE(report.first->finding.empty());
}

TEST(Replay, SeparatesInjectedFromInherited) {
  const Trace reference = Trace::open(captured("llama"));
  const Floor floor(captured("llama") / "floor.json", "f32/f32");
  EXPECT_EQ(replay(model_of("llama"), follow(reference), reference, floor).verdict, Verdict::within);
  // Another epsilon: every norm errs by itself, and nothing else does.
  TraceOptions options = follow(reference);
  options.model.config_patch = R"({"rms_norm_eps": 0.01})";
  const DiffReport report = replay(model_of("llama"), options, reference, floor);
  EXPECT_EQ(report.verdict, Verdict::divergent);
  for (const SiteScore& score : report.scores) {
    EXPECT_TRUE(score.score <= kBand || score.site.ends_with("norm")) << score.name();
  }
  const auto wrong = std::count_if(report.scores.begin(), report.scores.end(),
                                   [](const auto& each) { return each.score > kBand; });
  EXPECT_EQ(report.alone, wrong - 1);
  EXPECT_EQ(report.inherited, 0);
  const std::string text = report_text(report, false);
  EXPECT_NE(text.find(std::to_string(wrong - 1) + " later sites err by themselves"), std::string::npos)
      << text;
  EXPECT_EQ(text.find("within\n"), std::string::npos) << "only what errs is listed: " << text;
}

TEST(Traces, ComeBackFromDisk) {
  const fs::path folder = fs::path(testing::TempDir()) / ("trace-" + std::to_string(::getpid()));
  const Trace reference = Trace::open(captured("llama"));
  TraceOptions options = follow(reference);
  options.checksums = true;
  const Trace ours = record_trace(model_of("llama"), options);
  ours.save(folder);
  const Trace again = Trace::open(folder);
  EXPECT_EQ(again.unread_keys, ours.unread_keys);
  EXPECT_EQ(again.weights_sha256, ours.weights_sha256);
  EXPECT_FALSE(again.weights_sha256.empty());
  ASSERT_EQ(again.events().size(), ours.events().size());
  for (size_t i = 0; i < ours.events().size(); ++i) {
    EXPECT_EQ(again.events()[i].name(), ours.events()[i].name());
    EXPECT_TRUE(std::equal(ours.events()[i].values.begin(), ours.events()[i].values.end(),
                           again.events()[i].values.begin()));
  }
  fs::remove_all(folder);
}

TEST(Traces, LeaveTheLogitsAsTheyAre) {
  const Trace reference = Trace::open(captured("mixtral"));
  const Trace trace = record_trace(model_of("mixtral"), follow(reference));
  ModelOptions options;
  options.precision = Precision::f32;
  SessionOptions session;
  session.kv_type = KvType::f32;
  const Tensor logits =
      Session(Model::load(model_of("mixtral"), options), session).append(reference.sequences[0].ids);
  for (const TraceEvent& event : trace.events()) {
    if (event.site != "logits" || event.step != 0 || event.row != 0) continue;
    EXPECT_TRUE(std::equal(event.values.begin(), event.values.end(), logits.values().begin()));
  }
}

TEST(Traces, RefuseWhatIsBroken) {
  const fs::path folder = fs::path(testing::TempDir()) / ("broken-trace-" + std::to_string(::getpid()));
  const auto refuses = [&](const std::function<void()>& damage) {
    fs::remove_all(folder);
    fs::copy(captured("llama"), folder);
    EXPECT_NO_THROW(Trace::open(folder));
    damage();
    EXPECT_THROW(Trace::open(folder), Error);
  };
  refuses([&] { fs::remove(folder / "manifest.json"); });
  refuses([&] { fs::remove(folder / "tensors-00000.safetensors"); });
  refuses([&] { fs::resize_file(folder / "tensors-00000.safetensors", 5000); });
  refuses([&] { fs::resize_file(folder / "events.jsonl", 5000); });
  refuses([&] { fs::resize_file(folder / "manifest.json", 50); });
  refuses(
      [&] { std::ofstream(folder / "manifest.json") << R"({"format": "lockstep-trace", "version": 2})"; });
  refuses([&] { std::ofstream(folder / "events.jsonl", std::ios::app) << "{}\n"; });
  refuses([&] {
    std::ifstream lines(folder / "events.jsonl");
    std::string first;
    std::getline(lines, first);
    std::ofstream(folder / "events.jsonl", std::ios::app) << first << "\n";
  });
  const auto replaces = [&](const std::string& file, const std::string& from, const std::string& to) {
    refuses([&] {
      std::ifstream stream(folder / file);
      std::string text{std::istreambuf_iterator<char>(stream), {}};
      const size_t at = text.find(from);
      ASSERT_NE(at, std::string::npos) << from;
      std::ofstream(folder / file) << text.replace(at, from.size(), to);
    });
  };
  replaces("manifest.json", "\"level\": 2", "\"level\": 9");
  replaces("manifest.json", "\"fed\": [", "\"fed\": [], \"other\": [");
  replaces("events.jsonl", "\"row\": 1", "\"row\": 7");
  replaces("events.jsonl", "\"axes\": \"T C\"", "\"axes\": \"T Z\"");
  replaces("events.jsonl", "\"axes\": \"T C\"", "\"axes\": [\"T\", \"C\"]");
  replaces("events.jsonl", "\"shape\": [", "\"shape\": [1, ");
  replaces("events.jsonl", "\"site\": \"attn_norm\"", "\"site\": \"atn_norm\"");
  replaces("manifest.json", "\"weights_sha256\": {", "\"weights_sha256\": {\"other\": 1, ");
  refuses([&] {
    std::ofstream(folder / "events.jsonl").close();
    std::ofstream(folder / "manifest.json") << "{}";
  });
  fs::remove_all(folder);
}

TEST(Diff, AnotherModelIsSeenBeforeAnyTensor) {
  const Trace reference = Trace::open(captured("llama"));
  Trace other = edited(reference, [](TraceEvent&, std::vector<float>&) { return true; });
  other.layers = 3;
  const DiffReport report = diff(other, reference, Floor());
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("the models differ"), std::string::npos) << report.reason;
}

TEST(Floors, ThatHideEverythingAreRefused) {
  const fs::path file = fs::path(testing::TempDir()) / ("hiding-" + std::to_string(::getpid()) + ".json");
  for (const char* floor : {"1e300", "-1", "11", "null"}) {
    std::ofstream(file)
        << R"({"format": "lockstep-floor", "version": 1, "policies": {"f32/f32": {"prefill": {"embed": )"
        << floor << R"(}, "decode": {}}}})";
    EXPECT_THROW(Floor(file, "f32/f32"), Error) << floor;
  }
  fs::remove(file);
}

TEST(Check, HoldsForEveryArchitecture) {
  for (const char* name : {"llama", "llama-yarn", "mistral", "mixtral", "qwen2", "qwen2-window"}) {
    for (const KvType type : {KvType::f16, KvType::i16}) {
      for (const CheckResult& each : check_model(model_of(name), {}, type, 70))
        EXPECT_TRUE(each.held) << name << ", KV " << kv_type_name(type) << ": " << each.name;
    }
  }
}

// Faults that any reference-free check of their operation must see, and what it is called there.
TEST(Check, FaultsBreakWhatTheyTouch) {
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"llama", "gqa-tiled", "attention to a single key returns its value, in every head"},
      {"llama", "chunk-position", "equal tokens: a score depends on the distance of two positions alone"},
      {"mixtral", "experts-swapped", "experts given every row make of each what they made of it among few"},
  };
  for (const auto& [model, fault, broken] : cases) {
    int found = 0;
    for (const CheckResult& each : check_model(model_of(model), {}, KvType::f32, 40, fault))
      found += each.name == broken && !each.held ? 1 : 0;
    EXPECT_EQ(found, 1) << model << ", " << fault;
  }
}

TEST(Floors, AreMeasuredFromTraces) {
  const Trace reference = Trace::open(captured("llama"));
  std::vector<Trace> variants;
  variants.push_back(record_trace(model_of("llama"), follow(reference)));
  const fs::path file = fs::path(testing::TempDir()) / ("floor-" + std::to_string(::getpid()) + ".json");
  std::ofstream(file) << measure_floor(reference, variants, "f32/f32");
  const Floor floor(file, "f32/f32");
  EXPECT_GT(floor.at(false, "L01.q_rope", 1), 1e-8);
  EXPECT_LT(floor.at(false, "L01.q_rope", 1), 1e-5);
  EXPECT_THROW(Floor(file, "exact/f16"), Error);
  const DiffReport report = diff(variants[0], reference, floor);
  for (const SiteScore& score : report.scores) EXPECT_LE(score.score, 1) << score.name();
  fs::remove(file);
}

TEST(Reports, AreWhole) {
  const Trace reference = Trace::open(captured("mixtral"));
  const Floor floor(captured("mixtral") / "floor.json", "f32/f32");
  TraceOptions options = follow(reference);
  options.fault = "rope-flatten-heads";
  const DiffReport report = diff(record_trace(model_of("mixtral"), options), reference, floor);
  const std::string text = report_text(report, false);
  EXPECT_NE(text.find("DIVERGENT  first error: decode step 1, sequence 0, L00.q_rope, heads 1-5 of 6"),
            std::string::npos)
      << text;
  EXPECT_NE(report_json(report).find("\"schema\": \"lockstep-diff-1\""), std::string::npos);
  EXPECT_NE(report_html(report).find("</table>"), std::string::npos);
}

}  // namespace
}  // namespace lockstep

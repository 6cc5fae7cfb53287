// What may be concluded from traces that are damaged, of another model, or judged by a poor floor.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "support/traces.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::captured;
using test::edited;
using test::follow;
using test::model_of;
using Edit = std::function<bool(TraceEvent&, std::vector<float>&)>;

struct Case {
  explicit Case(const std::string& model, const std::string& policy = "f32/f32")
      : name(model), reference(Trace::open(captured(model))), floor(captured(model) / "floor.json", policy) {}
  Trace ours(const std::string& fault = {}) const {
    TraceOptions options = follow(reference);
    options.fault = fault;
    return record_trace(model_of(name), options);
  }
  DiffReport replayed(const Trace& damaged) const {
    return replay(model_of(name), follow(damaged), damaged, floor);
  }
  std::string name;
  Trace reference;
  Floor floor;
};

bool notes(const DiffReport& report, const std::string& part) {
  return std::ranges::any_of(report.notes,
                             [&](const std::string& each) { return each.find(part) != std::string::npos; });
}

Edit at(int step, const std::string& name, const std::function<void(std::vector<float>&)>& change) {
  return [=](TraceEvent& event, std::vector<float>& values) {
    if (event.step == step && event.row == 0 && event.name() == name) change(values);
    return true;
  };
}
void scale(std::vector<float>& values, float factor) {
  for (float& v : values) v *= factor;
}

// A floor.json of one policy, changed.
Floor changed_floor(const std::string& name, const std::function<void(json&)>& change) {
  const fs::path file = fs::path(testing::TempDir()) / ("changed-floor-" + std::to_string(::getpid()));
  std::ifstream stream(captured(name) / "floor.json");
  json floor = json::parse(stream);
  change(floor);
  std::ofstream(file) << floor.dump();
  Floor read(file, "f32/f32");
  fs::remove(file);
  return read;
}

// An error of 5e-5 in one product's input is one of 5e-5 in the product and as large a difference in the
// residual sums, where it is small; the logits do not move.
TEST(Diff, ErrorsThatDrownInTheResidualAreErrors) {
  const Case llama("llama");
  std::map<int64_t, std::vector<float>> change;  // of the residual, by position
  const Trace faulty = edited(llama.reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 0 || event.row != 0 || event.layer != 1) return true;
    std::vector<float>& moved = change[event.first_position];
    if (event.site == "o_proj") {
      moved = values;
      scale(moved, 5e-5F);
    }
    if (event.site == "attn_ctx" || event.site == "o_proj") scale(values, 1 + 5e-5F);
    if (event.site == "attn_resid" || event.site == "ffn_resid") {
      for (size_t i = 0; i < values.size(); ++i) values[i] += moved.at(i);
    }
    return true;
  });
  const DiffReport report = diff(faulty, llama.reference, llama.floor);
  EXPECT_EQ(report.verdict, Verdict::divergent) << report.reason;
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L01.attn_ctx");
}

// Layouts are tried on what was kept of each head.
TEST(Diff, ReducedRowsOfHeadsAreCompared) {
  const Case llama("llama");
  const auto folder = fs::path(testing::TempDir()) / ("reduced-" + std::to_string(::getpid()));
  for (const char* store : {"sample:8", "sketch:8"}) {
    TraceOptions options = follow(llama.reference);
    options.fault = "rope-interleaved";
    options.storage = parse_storage(store, 3);
    record_trace_to(folder, model_of("llama"), options);
    const DiffReport report = diff(Trace::open(folder), llama.reference, llama.floor);
    ASSERT_TRUE(report.first) << store;
    EXPECT_EQ(report.first->name(), "L00.q_rope") << store;
  }
  fs::remove_all(folder);
}

// Layer 0 turns queries and keys by position: two texts that meet in a token share them, and only them.
TEST(Diff, TokensThatMeetAreNotRecordedTwice) {
  TraceOptions options;
  options.sequences = {{{5, 6, 7}, {11}}, {{8, 9}, {11}}, {{1, 9, 4}, {11}}};
  const Trace meeting = record_trace(model_of("llama"), options);
  EXPECT_EQ(diff(meeting, meeting, Floor()).verdict, Verdict::within);
  std::vector<float> first;
  const Trace twice = edited(meeting, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 1 || event.name() != "L01.q_rope") return true;
    if (event.row == 0) first = values;
    if (event.row == 2) values = first;
    return true;
  });
  EXPECT_EQ(diff(twice, twice, Floor()).verdict, Verdict::inconclusive);
}

TEST(Diff, WhatIsNoNumberIsInheritedToo) {
  const Case llama("llama");
  bool begun = false;
  const Trace faulty = edited(llama.reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.row != 0) return true;
    begun = begun || event.name() == "L01.q_rope";
    if (begun) std::ranges::fill(values, std::numeric_limits<float>::quiet_NaN());
    return true;
  });
  const DiffReport report = diff(faulty, llama.reference, llama.floor);
  EXPECT_EQ(report.verdict, Verdict::divergent) << report.reason;
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L01.q_rope");
}

// Experts that the weights leave out were computed all the same.
TEST(Diff, ChoicesThatTheExpertsDoNotShowAreTheCaptures) {
  const Case mixtral("mixtral");
  const Trace damaged = edited(mixtral.reference, at(0, "L01.router_weights", [](auto& weights) {
                                 for (size_t row = 0; row < weights.size(); row += 4) {
                                   const auto best =
                                       std::max_element(weights.begin() + static_cast<int64_t>(row),
                                                        weights.begin() + static_cast<int64_t>(row) + 4);
                                   for (size_t e = row; e < row + 4; ++e)
                                     weights[e] = weights[e] == *best ? 1 : 0;
                                 }
                               }));
  EXPECT_EQ(diff(mixtral.ours(), damaged, mixtral.floor).verdict, Verdict::inconclusive);
}

TEST(Diff, LargeErrorsUnderCoarsePoliciesAreErrors) {
  const Case coarse("llama-q.Q4_1.gguf", "q8/f16");
  for (const char* fault :
       {"rope-flatten-heads", "rope-flatten-heads@layer=1", "gqa-tiled", "rope-interleaved"}) {
    const DiffReport report = diff(coarse.ours(fault), coarse.reference, coarse.floor);
    EXPECT_EQ(report.verdict, Verdict::divergent) << fault << ": " << report.reason;
  }
}

TEST(Diff, NoScaledTensorOfAReferenceBlamesTheEngine) {
  for (const char* name : {"mixtral", "llama"}) {
    const Case of(name);
    const Trace ours = of.ours();
    for (const TraceEvent& event : of.reference.events()) {
      if (event.row != 0 || (event.step != 0 && event.step != 2)) continue;
      for (const float factor : {1.001F, 0.999F}) {
        const Trace damaged =
            edited(of.reference, at(event.step, event.name(), [&](auto& v) { scale(v, factor); }));
        const DiffReport report = diff(ours, damaged, of.floor);
        if (event.site == "logits") {
          EXPECT_TRUE(notes(report, "nothing before it differs")) << name;
        } else {
          EXPECT_EQ(report.verdict, Verdict::inconclusive)
              << name << " " << event.name() << ", " << event.step;
        }
      }
    }
  }
}

// Captures that contradict themselves, and what diff and replay say of them.
TEST(Diff, ReferencesThatContradictThemselvesAreRefused) {
  const Case llama("llama");
  const Trace ours = llama.ours();
  using Where = std::function<bool(const TraceEvent&)>;
  const auto refused = [&](const Edit& edit, const std::string& reason) {
    const Trace damaged = edited(llama.reference, edit);
    EXPECT_EQ(llama.replayed(damaged).verdict, Verdict::inconclusive) << reason;
    const DiffReport report = diff(ours, damaged, llama.floor);
    EXPECT_EQ(report.verdict, Verdict::inconclusive) << reason;
    EXPECT_NE(report.reason.find(reason), std::string::npos) << report.reason;
  };
  const auto copied = [&](const Where& from, const Where& to, const std::string& reason) {
    std::map<std::string, std::vector<float>> kept;
    edited(llama.reference, [&](TraceEvent& event, std::vector<float>& values) {
      if (from(event)) kept[event.name()] = values;
      return true;
    });
    refused(
        [&](TraceEvent& event, std::vector<float>& values) {
          if (to(event)) values = kept.at(event.name());
          return true;
        },
        reason);
  };
  const auto pass = [](int step, int row) {
    return [=](const TraceEvent& event) { return event.step == step && event.row == row; };
  };
  copied(pass(1, 0), pass(2, 0), "whose tokens are others");
  copied(pass(1, 0), pass(1, 1), "whose tokens are others");
  // The rows of a token that the other sequence has too and of its neighbour: embeddings that do not fit.
  const auto& sequences = llama.reference.sequences;
  const auto again =
      std::ranges::find_if(sequences[0].ids,
                           [&](int32_t id) { return std::ranges::count(sequences[1].ids, id) > 0; }) -
      sequences[0].ids.begin();
  ASSERT_LT(again + 1, static_cast<int64_t>(sequences[0].ids.size()));
  refused(
      [&](TraceEvent& event, std::vector<float>& values) {
        if (event.step != 0 || event.row != 0) return true;
        const auto width = static_cast<int64_t>(values.size()) / event.shape[0];
        const auto row = values.begin() + again * width;
        std::swap_ranges(row, row + width, row + width);
        return true;
      },
      "is not what it was at");
  refused(at(0, "L01.ffn_resid", [](auto& v) { scale(v, 1.001F); }), "is not the sum of");
  // Without the logits of the pass its other sites still tell.
  const Trace damaged = edited(llama.reference, [](TraceEvent& event, std::vector<float>& values) {
    if (event.step == 0 && event.name() == "L01.q_rope") scale(values, 1.001F);
    return event.step != 0 || event.site != "logits";
  });
  const DiffReport report = diff(ours, damaged, llama.floor);
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("what is computed from it does not"), std::string::npos) << report.reason;
}

TEST(Replay, DamagedTensorsAreNotTheEngines) {
  const Case mixtral("mixtral");
  const auto swap = [](std::vector<float>& v) {
    const auto width = static_cast<int64_t>(v.size()) / 13;
    std::swap_ranges(v.begin() + 3 * width, v.begin() + 4 * width, v.begin() + 7 * width);
  };
  for (const char* site :
       {"L00.attn_norm", "L01.q_proj", "L01.q_rope", "L01.k_rope", "L00.scores", "L01.attn_ctx", "L00.o_proj",
        "L01.ffn_norm", "L01.expert_up", "L00.moe_out", "L01.ffn_resid", "final_norm"}) {
    for (const auto& change : {std::function<void(std::vector<float>&)>([](auto& v) { scale(v, 1.001F); }),
                               {[](auto& v) { scale(v, 0); }},
                               {swap}}) {
      const DiffReport report = mixtral.replayed(edited(mixtral.reference, at(0, site, change)));
      EXPECT_EQ(report.verdict, Verdict::inconclusive) << site << ": " << report.reason;
    }
  }
  // Operations that follow each other and are both wrong are the engine's.
  TraceOptions options = follow(mixtral.reference);
  options.fault = "experts-swapped";
  EXPECT_EQ(replay(model_of("mixtral"), options, mixtral.reference, mixtral.floor).verdict,
            Verdict::divergent);
}

TEST(Replay, WhatTheTraceLacksIsListed) {
  const Case llama("llama");
  const auto lacks = [&](const std::function<bool(const TraceEvent&)>& gone, const std::string& listed) {
    const DiffReport report = llama.replayed(
        edited(llama.reference, [&](TraceEvent& event, std::vector<float>&) { return !gone(event); }));
    EXPECT_EQ(report.verdict, Verdict::inconclusive) << listed;
    EXPECT_TRUE(std::ranges::any_of(report.unmatched, [&](const auto& each) {
      return each.text() == listed + ": not in the reference";
    })) << listed;
  };
  lacks([](const TraceEvent& e) { return e.step == 2; }, "step 2, sequence 0, L01.q_rope");
  lacks([](const TraceEvent& e) { return e.row == 1; }, "step 0, sequence 1, embed");
  lacks([](const TraceEvent& e) { return e.site == "logits"; }, "step 0, sequence 0, logits");
  lacks([](const TraceEvent& e) { return e.name() == "L01.k_rope"; }, "step 1, sequence 0, L01.k_rope");
}

TEST(Replay, RoutersWithoutAChoiceAreRefused) {
  const Case mixtral("mixtral");
  const DiffReport report =
      mixtral.replayed(edited(mixtral.reference, [](TraceEvent& event, std::vector<float>& values) {
        if (event.step == 1 && event.site == "router_weights") scale(values, 0);
        return true;
      }));
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("weights of some experts"), std::string::npos) << report.reason;
}

TEST(Bisect, LooksAtAllOfTheReference) {
  const Case mixtral("mixtral");
  const Trace damaged =
      edited(mixtral.reference,
             at(0, "L01.moe_out", [](auto& v) { v[0] = std::numeric_limits<float>::quiet_NaN(); }));
  const DiffReport report = bisect(model_of("mixtral"), follow(damaged), damaged, mixtral.floor, false);
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("NaN"), std::string::npos) << report.reason;
}

// A fault of layer 0 that the sums of that layer hide shows between layers in layer 1 only.
TEST(Bisect, FindsWhatResidualSumsHide) {
  const Case mixtral("mixtral");
  const Floor hiding = changed_floor("mixtral", [](json& floor) {
    for (const char* site : {"L00.attn_resid", "L00.ffn_resid"}) {
      for (const char* phase : {"prefill", "decode"}) floor["policies"]["f32/f32"][phase][site] = 0.06;
    }
  });
  TraceOptions options = follow(mixtral.reference);
  options.fault = "scores-in-f16@layer=0";
  const DiffReport report = bisect(model_of("mixtral"), options, mixtral.reference, hiding, false);
  ASSERT_TRUE(report.first) << report.reason;
  EXPECT_EQ(report.first->name(), "L00.scores");
  EXPECT_EQ(report.verdict, Verdict::divergent) << report.reason;
}

// Routers of layer 0 that cannot tell the experts apart, in both traces.
TEST(Diff, OnlyTiesAreTies) {
  const Case mixtral("mixtral");
  const auto chosen = [&](const std::function<void(std::span<float>)>& choose) {
    return edited(mixtral.reference, [&](TraceEvent& event, std::vector<float>& values) {
      if (event.layer != 0) return true;
      if (event.site == "router_logits") scale(values, 0);
      if (event.site != "router_weights") return true;
      const auto experts = static_cast<size_t>(event.shape[1]);
      for (size_t row = 0; row < values.size(); row += experts)
        choose(std::span(values).subspan(row, experts));
      return true;
    });
  };
  const auto first_two = chosen([](std::span<float> w) { w[0] = w[1] = 0.5F, w[2] = w[3] = 0; });
  const auto last_two = chosen([](std::span<float> w) { w[0] = w[1] = 0, w[2] = w[3] = 0.5F; });
  const auto one = chosen([](std::span<float> w) { w[0] = 1, w[1] = w[2] = w[3] = 0; });
  // Every row is another tie: nothing is left to conclude from.
  const DiffReport tied = diff(last_two, first_two, mixtral.floor);
  EXPECT_EQ(tied.verdict, Verdict::inconclusive) << tied.reason;
  EXPECT_NE(tied.reason.find("rows were left out"), std::string::npos) << tied.reason;
  EXPECT_TRUE(notes(tied, "tie: L00.router_weights"));
  const DiffReport fewer = diff(one, first_two, mixtral.floor);
  ASSERT_TRUE(fewer.first);
  EXPECT_EQ(fewer.first->name(), "L00.router_weights");
  EXPECT_EQ(fewer.left_out, 0);
}

// A single tie late in one of two sequences leaves enough.
TEST(Diff, RareTiesLeaveTheVerdict) {
  const Case mixtral("mixtral");
  const int64_t last = static_cast<int64_t>(mixtral.reference.sequences[0].ids.size()) - 1;
  std::vector<float> logits;
  Trace reference = edited(mixtral.reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 0 || event.row != 0 || event.name() != "L01.router_logits") return true;
    // The second and third of the last row become equal.
    const auto row = std::span(values).last(4);
    std::vector<float> sorted(row.begin(), row.end());
    std::ranges::sort(sorted, std::greater());
    for (float& v : row) v = v == sorted[2] ? sorted[1] : v;
    return true;
  });
  const Trace subject = edited(reference, [&](TraceEvent& event, std::vector<float>& values) {
    if (event.step != 0 || event.row != 0) return true;
    if (event.name() == "L01.router_logits") logits = values;
    if (event.name() != "L01.router_weights") return true;
    // The other of the two is chosen.
    const auto row = std::span(values).last(4), by = std::span(logits).last(4);
    for (size_t a = 0; a < 4; ++a) {
      for (size_t b = 0; b < 4; ++b) {
        if (a != b && by[a] == by[b] && row[a] != 0 && row[b] == 0) {
          std::swap(row[a], row[b]);
          return true;
        }
      }
    }
    return true;
  });
  const DiffReport report = diff(subject, reference, mixtral.floor);
  EXPECT_EQ(report.verdict, Verdict::within) << report.reason;
  EXPECT_TRUE(notes(report, "position " + std::to_string(last)));
  EXPECT_GT(report.left_out, 0);
  EXPECT_NE(report.reason.find("rows were left out"), std::string::npos) << report.reason;
}

TEST(Floors, ThatCannotJudgeConcludeNothing) {
  const Case llama("llama");
  const Trace ours = llama.ours();
  const auto verdict = [&](const Floor& floor) {
    const DiffReport report = diff(ours, llama.reference, floor);
    EXPECT_EQ(replay(model_of("llama"), follow(llama.reference), llama.reference, floor).verdict,
              report.verdict);
    return report.verdict;
  };
  EXPECT_EQ(verdict(llama.floor), Verdict::within);
  EXPECT_EQ(verdict(changed_floor("llama",
                                  [](json& floor) {
                                    for (auto& value : floor["policies"]["f32/f32"]["prefill"]) value = 0.3;
                                  })),
            Verdict::inconclusive)
      << "errors as large as the tensors are within it";
  EXPECT_EQ(verdict(changed_floor(
                "llama", [](json& floor) { floor["policies"]["f32/f32"]["decode"].erase("L01.q_rope"); })),
            Verdict::inconclusive)
      << "a site is missing";
  const auto of = [&](const std::string& architecture, int layers, const std::string& sum) {
    return changed_floor("llama", [&](json& floor) {
      floor["model"] = {{"architecture", architecture},
                        {"layers", layers},
                        {"weights_sha256", {{"model.safetensors", sum}}}};
    });
  };
  const std::string own = llama.reference.weights_sha256.at("model.safetensors");
  EXPECT_EQ(verdict(of("llama", 2, own)), Verdict::within);
  EXPECT_EQ(verdict(of("qwen2", 2, own)), Verdict::inconclusive);
  EXPECT_EQ(verdict(of("llama", 3, own)), Verdict::inconclusive);
  EXPECT_EQ(verdict(of("llama", 2, "0")), Verdict::inconclusive);
  // An error of half of a site is beyond any floor.
  const Floor poor = changed_floor("llama", [](json& floor) {
    for (auto& value : floor["policies"]["f32/f32"]["prefill"]) value = 0.06;
  });
  const DiffReport report = diff(llama.ours("rope-interleaved"), llama.reference, poor);
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L00.q_rope");
}

TEST(Floors, PoliciesThatRoundNeedOne) {
  const Case llama("llama");
  TraceOptions options = follow(llama.reference);
  options.model.precision = Precision::exact;
  options.kv_type = KvType::f16;
  for (const DiffReport& report : {diff(record_trace(model_of("llama"), options), llama.reference, Floor()),
                                   replay(model_of("llama"), options, llama.reference, Floor()),
                                   bisect(model_of("llama"), options, llama.reference, Floor(), false)}) {
    EXPECT_EQ(report.verdict, Verdict::inconclusive);
    EXPECT_NE(report.reason.find("no floor for policy exact/f16"), std::string::npos) << report.reason;
  }
  EXPECT_TRUE(notes(diff(llama.ours(), llama.reference, Floor()), "no floor was measured"));
}

TEST(Floors, VariantsThatStandAloneAreNamed) {
  const Case llama("llama");
  std::vector<Trace> variants;
  variants.push_back(llama.ours());
  TraceOptions options = follow(llama.reference);
  options.model.isa = "scalar";
  variants.push_back(record_trace(model_of("llama"), options));
  EXPECT_TRUE(json::parse(measure_floor(llama.reference, variants, "f32/f32")).at("warnings").empty());
  variants.push_back(llama.ours("rope-half-the-dims"));
  variants.back().where = "broken";
  const json warnings = json::parse(measure_floor(llama.reference, variants, "f32/f32")).at("warnings");
  EXPECT_TRUE(std::ranges::any_of(warnings, [](const json& each) {
    return each.get<std::string>().starts_with("broken stands alone at");
  })) << warnings.dump();
}

TEST(Models, ThatDifferAreToldBeforeAnyTensor) {
  const Case mixtral("mixtral"), mistral("mistral");
  for (const DiffReport& report :
       {replay(model_of("mistral"), follow(mixtral.reference), mixtral.reference, Floor()),
        bisect(model_of("mistral"), follow(mixtral.reference), mixtral.reference, Floor(), false),
        replay(model_of("mixtral"), follow(mistral.reference), mistral.reference, Floor())}) {
    EXPECT_EQ(report.verdict, Verdict::inconclusive);
    EXPECT_TRUE(report.reason.starts_with("the models differ: m")) << report.reason;
  }
  // Fewer columns in the residual stream, and one layer more.
  const auto narrow = [](TraceEvent& event, std::vector<float>& values) {
    if (event.site != "ffn_resid") return true;
    event.shape[1] /= 2;
    values.resize(values.size() / 2);
    return true;
  };
  const Case llama("llama");
  const DiffReport report = diff(edited(llama.reference, narrow), llama.reference, llama.floor);
  EXPECT_EQ(report.verdict, Verdict::inconclusive);
  EXPECT_NE(report.reason.find("at ffn_resid"), std::string::npos) << report.reason;
  Trace deeper = edited(llama.reference, [](TraceEvent&, std::vector<float>&) { return true; });
  deeper.layers = 3;
  EXPECT_TRUE(llama.replayed(deeper).reason.starts_with("the models differ: 2 layers"))
      << llama.replayed(deeper).reason;
}

TEST(Reports, SayWhatWasNotComparedBeforeTheFirstError) {
  const Case llama("llama");
  const Trace faulty = edited(llama.ours("rope-interleaved"), [](TraceEvent& event, std::vector<float>&) {
    return event.site == "embed" || event.site == "ffn_resid" || event.site == "logits";
  });
  const DiffReport report = diff(faulty, llama.reference, llama.floor);
  ASSERT_TRUE(report.first);
  EXPECT_EQ(report.first->name(), "L00.ffn_resid");
  const auto before = std::ranges::count_if(llama.reference.events(), [](const TraceEvent& event) {
    return event.step == 0 && event.layer == 0 && event.site != "ffn_resid";
  });
  EXPECT_EQ(report.skipped, before);
  EXPECT_NE(
      report_text(report, false).find("(" + std::to_string(before) + " sites before it were not compared)"),
      std::string::npos)
      << report_text(report, false);
}

TEST(Faults, TheDocumentsTableIsTheCatalogue) {
  std::ifstream document(fs::path(LOCKSTEP_ROOT) / "docs/faults.md");
  std::set<std::string> said, are;
  for (std::string line; std::getline(document, line);) {
    if (line.starts_with("| ") && line.find("| `") != std::string::npos) said.insert(line);
  }
  for (const Fault& fault : faults())
    are.insert("| " + std::to_string(fault.kind) + " | `" + fault.name + "` | `" + fault.site + "` | " +
               fault.summary + " |");
  EXPECT_EQ(said, are);
}

TEST(Faults, ThatCannotActAreRefused) {
  TraceOptions options = follow(Trace::open(captured("llama")));
  const auto refused = [&](const char* model, const std::string& fault) {
    EXPECT_THROW(require_acting(fault, model_of(model), options), Error) << fault;
  };
  for (const char* place : {"embedding-scale@layer=1", "logit-softcap@layer=0", "rope-interleaved@head=5-2"})
    EXPECT_THROW(find_fault(place), Error) << place;
  // Two KV heads; head 0 is rotated, and has the same KV head either way; no experts; no window.
  for (const char* fault : {"k-unpermuted-by-query-heads@head=2", "rope-flatten-heads@head=0",
                            "gqa-tiled@head=0", "router-top-1", "window-missing", "rope-yarn-ignored"})
    refused("llama", fault);
  EXPECT_NO_THROW(require_acting("rope-flatten-heads@head=0-1", model_of("llama"), options));
  EXPECT_NO_THROW(require_acting("", model_of("llama"), options));
  options.sequences = {{options.sequences[0].ids, {}}};
  refused("llama", "kv-lost-in-decode");
  options.steps = 1;
  EXPECT_NO_THROW(require_acting("kv-lost-in-decode", model_of("llama"), options));
  refused("llama", "rows-share-keys");
}

}  // namespace
}  // namespace lockstep

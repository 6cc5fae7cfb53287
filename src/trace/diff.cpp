// Two traces compared in causal order; our operations fed with a reference's tensors.
#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "format/json.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/inject.h"
#include "trace/passes.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Causal order of the sites within a pass.
constexpr std::array<std::string_view, 21> kOrder = {
    "embed",    "attn_norm", "q_proj",     "k_proj",   "v_proj",        "q_rope",         "k_rope",
    "attn_ctx", "o_proj",    "attn_resid", "ffn_norm", "router_logits", "router_weights", "gate",
    "up",       "act",       "down",       "moe_out",  "ffn_resid",     "final_norm",     "logits"};

// step, layer (those after the layers come last), place in the layer, sequence
using Place = std::tuple<int, int, int, int>;
Place place_of(const TraceEvent& event) {
  const auto at = static_cast<int>(std::ranges::find(kOrder, event.site) - kOrder.begin());
  const bool after = event.site == "final_norm" || event.site == "logits";
  return {event.step,
          event.layer != kNoLayer ? event.layer
          : after                 ? std::numeric_limits<int>::max()
                                  : -1,
          at, event.row};
}

// All rows of one site in one pass: chunks joined by position.
struct Joined {
  const TraceEvent* event = nullptr;  // the first of them
  std::map<int64_t, std::span<const float>> rows;
};
std::map<Place, Joined> join(const Trace& trace) {
  std::map<Place, Joined> all;
  for (const TraceEvent& event : trace.events()) {
    Joined& joined = all[place_of(event)];
    if (joined.event == nullptr) joined.event = &event;
    const auto width = event.values.size() / static_cast<size_t>(event.shape[0]);
    for (int64_t t = 0; t < event.shape[0]; ++t) {
      joined.rows[event.first_position + t] = event.values.subspan(static_cast<size_t>(t) * width, width);
    }
  }
  return all;
}

double norm(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * v;
  return std::sqrt(sum);
}
double distance(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  return std::isnan(sum) ? std::numeric_limits<double>::infinity() : std::sqrt(sum);
}
bool broken(std::span<const float> x) {
  return std::ranges::any_of(x, [](float v) { return !std::isfinite(v); });
}

// Sizes by which errors are divided: those of the row, but no less than a tenth of what is usual at the site.
struct Sizes {
  double row = 0;   // usual norm of a row
  double head = 0;  // usual norm of a head's part
};
Sizes usual_sizes(const Joined& reference, int64_t heads) {
  double sum = 0;
  for (const auto& [position, row] : reference.rows) sum += std::pow(norm(row), 2);
  const double row = std::sqrt(sum / static_cast<double>(std::max<size_t>(1, reference.rows.size())));
  return {row, row / std::sqrt(static_cast<double>(std::max<int64_t>(1, heads)))};
}
double relative(std::span<const float> got, std::span<const float> truth, double usual) {
  return distance(got, truth) / std::max({norm(truth), 0.1 * usual, 1e-30});
}

// Permutations that are easily forgotten, tried on one row. Empty: none explains the difference.
std::string explain_layout(const Joined& subject, const Joined& reference, const Sizes& usual, double bound) {
  if (reference.event->axes != "T H D") return {};
  const int64_t heads = reference.event->shape[1], width = reference.event->shape[2];
  const auto test = [&](auto from) {
    double worst = 0;
    for (const auto& [position, row] : reference.rows) {
      const auto mine = subject.rows.find(position);
      if (mine == subject.rows.end()) return false;
      std::vector<float> moved(row.size());
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < width; ++d)
          moved[static_cast<size_t>(h * width + d)] = mine->second[static_cast<size_t>(from(h, d))];
      }
      worst = std::max(worst, relative(moved, row, usual.row));
    }
    return worst <= bound;
  };
  if (width % 2 == 0) {
    if (test([&](int64_t h, int64_t d) { return h * width + 2 * (d % (width / 2)) + d / (width / 2); }))
      return "equal after taking neighbours apart into halves";
    if (test([&](int64_t h, int64_t d) { return h * width + d % 2 * (width / 2) + d / 2; }))
      return "equal after interleaving the halves of each head";
  }
  for (int64_t groups = 2; groups < heads; ++groups) {
    if (heads % groups != 0) continue;
    if (test(
            [&](int64_t h, int64_t d) { return (h % groups * (heads / groups) + h / groups) * width + d; })) {
      return fmt::format("equal after regrouping the heads, {} x {} to {} x {}", groups, heads / groups,
                         heads / groups, groups);
    }
  }
  return {};
}

class Comparison {
 public:
  Comparison(const Floor& floor, DiffReport& report) : floor_(floor), report_(report) {}

  SiteScore score(const Joined& subject, const Joined& reference) {
    const TraceEvent& event = *reference.event;
    SiteScore result{event.step, event.row, event.layer, event.site, 0, 0, 0, 0, -1, {}, {}, {}};
    const int64_t heads = event.axes == "T H D" && event.shape.rank() == 3 ? event.shape[1] : 0;
    const auto width = static_cast<int64_t>(event.values.size()) / event.shape[0];
    result.floor = floor_.at(event.step > 0, event.name(), width);
    result.heads.assign(static_cast<size_t>(heads), 0.0);
    const Sizes usual = usual_sizes(reference, heads);
    for (const auto& [position, row] : reference.rows) {
      const auto mine = subject.rows.find(position);
      if (mine == subject.rows.end() || mine->second.size() != row.size() || excluded(event.row, position))
        continue;
      const double error = relative(mine->second, row, usual.row);
      if (error > result.error || result.error == 0) {
        result.error = error;
        result.token = position;
      }
      if (error > kBand * result.floor && result.first_bad < 0) result.first_bad = position;
      for (int64_t h = 0; h < heads; ++h) {
        const auto part = static_cast<size_t>(width / heads);
        const auto begin = static_cast<size_t>(h) * part;
        double& worst = result.heads[static_cast<size_t>(h)];
        worst = std::max(
            worst,
            relative(mine->second.subspan(begin, part), row.subspan(begin, part), usual.head) / result.floor);
      }
    }
    result.score = result.error / result.floor;
    for (size_t h = 0; h < result.heads.size(); ++h) {
      if (result.heads[h] > kBand) result.bad_heads.push_back(static_cast<int>(h));
    }
    if (result.score > kBand)
      result.finding = explain_layout(subject, reference, usual, kBand * result.floor);
    return result;
  }

  // A token whose experts were chosen by less than the floor is a tie: it and what follows are left out.
  void leave_out_ties(const Joined& subject, const Joined& weights, const Joined& logits) {
    const TraceEvent& event = *weights.event;
    const auto width = static_cast<int64_t>(event.values.size()) / event.shape[0];
    const double floor = floor_.at(event.step > 0, logits.event->name(), width);
    for (const auto& [position, row] : weights.rows) {
      const auto mine = subject.rows.find(position);
      const auto scores = logits.rows.find(position);
      if (mine == subject.rows.end() || scores == logits.rows.end() || mine->second.size() != row.size())
        continue;
      bool same = true;
      float least = std::numeric_limits<float>::infinity(), most = -least;
      for (size_t e = 0; e < row.size(); ++e) {
        same = same && (row[e] != 0) == (mine->second[e] != 0);
        if (row[e] != 0) least = std::min(least, scores->second[e]);
        if (row[e] == 0) most = std::max(most, scores->second[e]);
      }
      if (same || (least - most) > kBand * floor * norm(scores->second)) continue;
      report_.notes.push_back(
          fmt::format("tie: {}, position {}, experts chosen by a margin of {:.2g}; left out from there",
                      event.name(), position, least - most));
      const auto [known, is_new] = excluded_.emplace(event.row, position);
      if (!is_new) known->second = std::min(known->second, position);
    }
  }

 private:
  bool excluded(int row, int64_t position) const {
    const auto from = excluded_.find(row);
    return from != excluded_.end() && position >= from->second;
  }

  const Floor& floor_;
  DiffReport& report_;
  std::map<int, int64_t> excluded_;
};

std::string same_inputs(const Trace& subject, const Trace& reference) {
  if (subject.sequences.size() != reference.sequences.size()) {
    return fmt::format("expected {} sequences as in the reference, got {}", reference.sequences.size(),
                       subject.sequences.size());
  }
  for (size_t s = 0; s < subject.sequences.size(); ++s) {
    if (subject.sequences[s].ids != reference.sequences[s].ids) {
      const auto [mine, theirs] = std::ranges::mismatch(subject.sequences[s].ids, reference.sequences[s].ids);
      return fmt::format(
          "token ids of sequence {} differ from place {} on ({} and {} tokens): tokenizer, BOS or template",
          s, mine - subject.sequences[s].ids.begin(), subject.sequences[s].ids.size(),
          reference.sequences[s].ids.size());
    }
    if (subject.sequences[s].fed != reference.sequences[s].fed)
      return fmt::format("sequence {} was fed other tokens in decode; use --follow", s);
  }
  for (const auto& [file, sum] : reference.weights_sha256) {
    const auto mine = subject.weights_sha256.find(file);
    if (mine != subject.weights_sha256.end() && mine->second != sum) return "the weights differ: " + file;
  }
  return {};
}

// What is wrong with a trace by itself.
std::string self_check(const Trace& trace) {
  std::map<std::tuple<int, int, std::string, std::string>, int> hashes;  // step, row, site, hash -> layer
  for (const TraceEvent& event : trace.events()) {
    if (broken(event.values))
      return fmt::format("{}: {} of step {} holds NaN or infinity", trace.where, event.name(), event.step);
    if (event.layer == kNoLayer) continue;
    const auto [known, is_new] =
        hashes.emplace(std::tuple(event.step, event.row, event.site, event.hash), event.layer);
    if (!is_new)
      return fmt::format("{}: {} of step {} is the very same as in layer {}: recorded twice?", trace.where,
                         event.name(), event.step, known->second);
  }
  return {};
}

void conclude(DiffReport& report) {
  for (const SiteScore& each : report.scores) {
    if (each.score <= kBand) continue;
    if (!report.first) {
      report.first = each;
    } else {
      ++report.inherited;
    }
  }
  const bool covered = report.unmatched.empty() && report.compared == report.expected && report.compared > 0;
  if (!report.first) {
    report.verdict = covered ? Verdict::within : Verdict::inconclusive;
    report.reason =
        covered ? "every site is within the floor" : "no difference, but not every site could be compared";
    return;
  }
  report.verdict = Verdict::divergent;
  const SiteScore& first = *report.first;
  report.reason =
      fmt::format("{} step {}, sequence {}, {}, position {}", first.step == 0 ? "prefill," : "decode,",
                  first.step, first.row, first.name(), first.first_bad);
}

// A difference that the logits of its own pass have not inherited is none of computation: the recorded
// tensors do not fit their own successors.
void check_inheritance(DiffReport& report) {
  if (!report.first || report.first->site == "logits") return;
  const auto logits = std::ranges::find_if(report.scores, [&](const SiteScore& each) {
    return each.step == report.first->step && each.row == report.first->row && each.site == "logits";
  });
  if (logits == report.scores.end() || logits->score > kBand) return;
  report.verdict = Verdict::inconclusive;
  report.reason = fmt::format(
      "{} of step {} differs, yet the logits computed from it do not: one of the captures is wrong there",
      report.first->name(), report.first->step);
}

void note_argmax(const Joined& subject, const Joined& reference, double floor, DiffReport& report) {
  for (const auto& [position, row] : reference.rows) {
    const auto mine = subject.rows.find(position);
    if (mine == subject.rows.end() || mine->second.size() != row.size()) continue;
    const auto theirs = std::ranges::max_element(row) - row.begin();
    const auto ours = std::ranges::max_element(mine->second) - mine->second.begin();
    if (ours == theirs) continue;
    const double margin = row[static_cast<size_t>(theirs)] - row[static_cast<size_t>(ours)];
    report.notes.push_back(
        fmt::format("step {}, sequence {}: the likeliest token flips from {} to {} (margin {:.3g}{})",
                    reference.event->step, reference.event->row, theirs, ours, margin,
                    margin <= kBand * floor * norm(row) ? ", a tie" : ""));
    return;
  }
}

}  // namespace

std::string SiteScore::name() const {
  return layer == kNoLayer ? site : fmt::format("L{:02}.{}", layer, site);
}

Floor::Floor(const std::filesystem::path& file, const std::string& policy) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) fail(ErrorCode::not_found, "[{}] floor: expected a readable file, got none", file.string());
  const json data = parse_json(std::string{std::istreambuf_iterator<char>(stream), {}}, file.string());
  try {
    if (data.at("format") != "lockstep-floor" || data.at("version") != 1)
      throw json::other_error::create(500, "version", nullptr);
    const json& table = data.at("policies").at(policy);
    prefill_ = table.at("prefill").get<std::map<std::string, double>>();
    decode_ = table.at("decode").get<std::map<std::string, double>>();
  } catch (const json::exception&) {
    fail(ErrorCode::format, "[{}] floor: expected a floor of version 1 with the policy {}, got another",
         file.string(), policy);
  }
}

double Floor::at(bool decode, const std::string& name, int64_t width) const {
  const double least = 0x1p-23 * std::sqrt(static_cast<double>(width));
  const auto& table = decode ? decode_ : prefill_;
  const auto known = table.find(name);
  return std::max(least, known == table.end() ? 0.0 : known->second);
}

std::string measure_floor(const Trace& truth, std::span<const Trace> variants, const std::string& policy) {
  std::map<std::string, double> prefill, decode;
  const auto expected = join(truth);
  for (const Trace& variant : variants) {
    if (const std::string problem = same_inputs(variant, truth); !problem.empty()) {
      fail(ErrorCode::invalid_argument, "[{}] floor: {}", variant.where, problem);
    }
    for (const auto& [place, joined] : join(variant)) {
      const auto reference = expected.find(place);
      if (reference == expected.end()) continue;
      const Sizes usual = usual_sizes(reference->second, 0);
      double& worst = (joined.event->step == 0 ? prefill : decode)[joined.event->name()];
      for (const auto& [position, row] : reference->second.rows) {
        const auto mine = joined.rows.find(position);
        if (mine != joined.rows.end() && mine->second.size() == row.size())
          worst = std::max(worst, relative(mine->second, row, usual.row));
      }
    }
  }
  return json{{"format", "lockstep-floor"},
              {"version", 1},
              {"policies", {{policy, {{"prefill", prefill}, {"decode", decode}}}}}}
      .dump(1);
}

DiffReport diff(const Trace& subject, const Trace& reference, const Floor& floor) {
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  for (const std::string& problem : {same_inputs(subject, reference), self_check(reference)}) {
    report.reason = problem;
    if (!problem.empty()) return report;
  }
  const auto ours = join(subject);
  const auto theirs = join(reference);
  Comparison comparison(floor, report);
  for (const auto& [place, joined] : theirs) {
    ++report.expected;
    const auto mine = ours.find(place);
    if (mine == ours.end()) {
      report.unmatched.push_back(
          fmt::format("step {}, {}: only in {}", std::get<0>(place), joined.event->name(), reference.engine));
      continue;
    }
    if (mine->second.rows.size() != joined.rows.size() ||
        mine->second.rows.begin()->second.size() != joined.rows.begin()->second.size()) {
      report.unmatched.push_back(fmt::format("step {}, {}: shapes {} and {}", std::get<0>(place),
                                             joined.event->name(), mine->second.event->shape.str(),
                                             joined.event->shape.str()));
      continue;
    }
    ++report.compared;
    if (joined.event->site == "router_weights") {
      const auto logits =
          theirs.find({std::get<0>(place), std::get<1>(place), std::get<2>(place) - 1, std::get<3>(place)});
      if (logits != theirs.end()) comparison.leave_out_ties(mine->second, joined, logits->second);
    }
    report.scores.push_back(comparison.score(mine->second, joined));
    if (joined.event->site == "logits") note_argmax(mine->second, joined, report.scores.back().floor, report);
  }
  for (const auto& [place, joined] : ours) {
    if (!theirs.contains(place))
      report.unmatched.push_back(
          fmt::format("step {}, {}: only in {}", std::get<0>(place), joined.event->name(), subject.engine));
  }
  conclude(report);
  check_inheritance(report);
  return report;
}

namespace {

// Records what our operation makes of the reference's tensors, and then puts the reference's in its place.
class Replayer : public Observer {
 public:
  Replayer(const Trace& reference, const PassRows& rows, Trace& ours) : rows_(rows), ours_(ours) {
    for (const TraceEvent& event : reference.events()) {
      for (int64_t t = 0; t < event.shape[0]; ++t) {
        const auto width = event.values.size() / static_cast<size_t>(event.shape[0]);
        known_[{event.step, event.row, event.layer, event.site, event.first_position + t}] =
            event.values.subspan(static_cast<size_t>(t) * width, width);
      }
      axes_[event.site] = event.axes;
    }
  }

  void observe(int layer, Site site, Tensor& tensor) override {
    const std::string name(site_name(site));
    for (int64_t t = 0; t < tensor.shape()[0]; ++t) {
      const int row = rows_.sequences[static_cast<size_t>(t)];
      const int64_t position = rows_.positions[static_cast<size_t>(t)];
      const auto known = known_.find({rows_.step, row, layer, name, position});
      if (known == known_.end() || known->second.size() != static_cast<size_t>(tensor.row_size())) continue;
      TraceEvent event;
      event.step = rows_.step;
      event.row = row;
      event.layer = layer;
      event.site = name;
      event.first_position = position;
      event.shape = tensor.shape();
      event.shape[0] = 1;
      event.axes = axes_[name];
      ours_.add(std::move(event), {tensor.row(t), static_cast<size_t>(tensor.row_size())});
      std::ranges::copy(known->second, tensor.row(t));
    }
  }

 private:
  const PassRows& rows_;
  Trace& ours_;
  std::map<std::tuple<int, int, int, std::string, int64_t>, std::span<const float>> known_;
  std::map<std::string, std::string> axes_;
};

}  // namespace

DiffReport replay(const std::filesystem::path& path, const TraceOptions& options, const Trace& reference,
                  const Floor& floor) {
  const auto model = Model::load(path, options.model);
  TraceOptions fed = options;
  fed.sequences = reference.sequences;
  Trace ours;
  ours.engine = "lockstep " + std::string(model->isa()) + ", on the reference's inputs";
  PassRows rows;
  Replayer replayer(reference, rows, ours);
  Taps taps(&replayer);
  ours.sequences = run_passes(model, fed, rows, taps);
  DiffReport report;
  report.verdict = Verdict::inconclusive;
  report.reason = self_check(reference);
  if (!report.reason.empty()) return report;
  const auto mine = join(ours);
  const auto theirs = join(reference);
  Comparison comparison(floor, report);
  for (const auto& [place, joined] : theirs) {
    ++report.expected;
    const auto found = mine.find(place);
    if (found == mine.end()) {
      report.unmatched.push_back(
          fmt::format("step {}, {}: not computed here", std::get<0>(place), joined.event->name()));
      continue;
    }
    ++report.compared;
    report.scores.push_back(comparison.score(found->second, joined));
  }
  conclude(report);
  report.notes.emplace_back("errors are those of each operation alone, on the reference's inputs");
  return report;
}

}  // namespace lockstep

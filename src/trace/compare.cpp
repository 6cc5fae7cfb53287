#include "trace/compare.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "tensor/fail.h"
#include "trace/storage.h"
#include "trace/ties.h"

namespace lockstep {
namespace {

double distance(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  return std::isnan(sum) ? std::numeric_limits<double>::infinity() : std::sqrt(sum);
}

// Permutations that are easily forgotten, tried on one row. Empty: none explains the difference.
std::string explain_layout(const Joined& subject, const Joined& reference, const Sizes& usual, double bound) {
  if (reference.event->axes != "T H D") return {};
  if (reference.rows.empty()) return {};
  // Of a head, as kept: the same columns of each.
  const int64_t heads = reference.event->shape[1];
  const int64_t width = static_cast<int64_t>(reference.rows.begin()->second.size()) / heads;
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
  if (!is_reduced(subject, reference) && width % 2 == 0) {
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

// Rows over keys end with their pass: those of earlier chunks are filled up to the longest, with the zeros of
// what is not seen.
void fill_up_keys(Joined& joined) {
  const int64_t heads = joined.event->shape[1];
  size_t longest = 0;
  for (const auto& [position, row] : joined.rows) longest = std::max(longest, row.size());
  for (auto& [position, row] : joined.rows) {
    if (row.size() == longest) continue;
    const size_t keys = row.size() / static_cast<size_t>(heads);
    std::vector<float> filled(longest);
    for (size_t h = 0; h < static_cast<size_t>(heads); ++h)
      std::ranges::copy(row.subspan(h * keys, keys),
                        filled.begin() + static_cast<int64_t>(h * longest) / heads);
    joined.reduced.push_back(std::make_shared<const std::vector<float>>(std::move(filled)));
    row = *joined.reduced.back();
  }
}

}  // namespace

bool is_reduced(const Joined& subject, const Joined& reference) {
  return subject.event->width != 0 || reference.event->width != 0;
}

std::string SiteScore::name() const {
  return layer == kNoLayer ? site : fmt::format("L{:02}.{}", layer, site);
}

Place place_of(int step, int layer, const std::string& site, int row) {
  const auto known = find_site(site);
  const int at = known ? static_cast<int>(*known) : static_cast<int>(Site::logits) + 1;
  const bool after = known && *known >= Site::final_norm;
  return {step, layer != kNoLayer ? layer : after ? std::numeric_limits<int>::max() : -1, at, site, row};
}

std::map<Place, Joined> join(const Trace& trace, const TraceStorage& storage) {
  std::map<Place, Joined> all;
  for (const TraceEvent& event : trace.events()) {
    Joined& joined = all[place_of(event.step, event.layer, event.site, event.row)];
    if (joined.event == nullptr) joined.event = &event;
    std::span<const float> values = event.values;
    const int64_t last = event.shape[event.shape.rank() - 1];
    if (event.width == 0 && !kept_whole(storage, last, event.axes)) {
      joined.reduced.push_back(std::make_shared<const std::vector<float>>(reduce(values, last, storage)));
      values = *joined.reduced.back();
    }
    const auto width = values.size() / static_cast<size_t>(event.shape[0]);
    for (int64_t t = 0; t < event.shape[0]; ++t) {
      joined.rows[event.first_position + t] = values.subspan(static_cast<size_t>(t) * width, width);
    }
  }
  for (auto& [place, joined] : all) {
    if (joined.event->axes == "T H K") fill_up_keys(joined);
  }
  return all;
}

bool same_rows(const Joined& one, const Joined& other) {
  return std::ranges::equal(one.rows, other.rows, [](const auto& a, const auto& b) {
    return a.first == b.first && a.second.size() == b.second.size();
  });
}

int64_t heads_of(const TraceEvent& event) { return event.shape.rank() == 3 ? event.shape[1] : 0; }

double norm(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * v;
  return std::sqrt(sum);
}
Sizes usual_sizes(const Joined& reference, int64_t heads) {
  double sum = 0;
  for (const auto& [position, row] : reference.rows) sum += std::pow(norm(row), 2);
  const double row = std::sqrt(sum / static_cast<double>(std::max<size_t>(1, reference.rows.size())));
  return {row, row / std::sqrt(static_cast<double>(std::max<int64_t>(1, heads)))};
}
double relative(std::span<const float> got, std::span<const float> truth, double usual) {
  return distance(got, truth) / std::max({norm(truth), 0.1 * usual, 1e-30});
}

// An error of a row is that of sums over as many columns as the row has, kept or not.
int64_t row_width(const TraceEvent& event) {
  const int64_t width = static_cast<int64_t>(event.values.size()) / event.shape[0];
  return event.width > 0 ? width / event.shape[event.shape.rank() - 1] * event.width : width;
}

double Comparison::floor_of(const TraceEvent& event) const {
  return std::min(kMostFloor, floor_.at(event.step > 0, event.name(), row_width(event)));
}

std::string Comparison::unjudged(const TraceEvent& event) const {
  const bool decode = event.step > 0;
  if (!floor_.knows(decode, event.name())) return "the floor has no value for it";
  if (const double floor = floor_.at(decode, event.name(), row_width(event)); floor > kCoarsestFloor)
    return fmt::format("its floor, {:.2g}, is too large to judge by", floor);
  return {};
}

bool Comparison::left_out(const Joined& reference) const {
  const int sequence = reference.event->row;
  if (!std::ranges::all_of(reference.rows, [&](const auto& row) { return excluded(sequence, row.first); }))
    return false;
  const auto rows = static_cast<int64_t>(reference.rows.size());
  report_.rows += rows;
  report_.left_out += rows;
  return true;
}

bool Comparison::excluded(int row, int64_t position) const {
  const auto from = excluded_.find(row);
  return from != excluded_.end() && position >= from->second;
}

SiteScore Comparison::score(const Joined& subject, const Joined& reference) const {
  const TraceEvent& event = *reference.event;
  SiteScore result{event.step, event.row, event.layer, event.site, row_width(event), 0, false, 0, 0, 0,
                   -1,         {},        {},          {}};
  const int64_t heads = heads_of(event);
  result.floor = floor_of(event);
  result.heads.assign(static_cast<size_t>(heads), 0.0);
  const Sizes usual = usual_sizes(reference, heads);
  report_.rows += static_cast<int64_t>(reference.rows.size());
  for (const auto& [position, row] : reference.rows) {
    const auto mine = subject.rows.find(position);
    if (excluded(event.row, position)) {
      ++report_.left_out;
      continue;
    }
    const double error = relative(mine->second, row, usual.row);
    if (error > result.error || result.error == 0) {
      result.error = error;
      result.token = position;
    }
    if (error > kBand * result.floor && result.first_bad < 0) result.first_bad = position;
    for (int64_t h = 0; h < heads; ++h) {
      const size_t part = row.size() / static_cast<size_t>(heads);
      const auto begin = static_cast<size_t>(h) * part;
      double& worst = result.heads[static_cast<size_t>(h)];
      worst =
          std::max(worst, relative(mine->second.subspan(begin, part), row.subspan(begin, part), usual.head) /
                              result.floor);
    }
  }
  result.score = result.error / result.floor;
  for (size_t h = 0; h < result.heads.size(); ++h) {
    if (result.heads[h] > kBand) result.bad_heads.push_back(static_cast<int>(h));
  }
  if (result.score > kBand) result.finding = explain_layout(subject, reference, usual, kBand * result.floor);
  return result;
}

HeadGrid Comparison::grid(const Joined& subject, const Joined& reference) const {
  HeadGrid grid;
  const int64_t heads = std::max<int64_t>(1, heads_of(*reference.event));
  const Sizes usual = usual_sizes(reference, heads);
  for (const auto& [position, row] : reference.rows) {
    const auto mine = subject.rows.find(position);
    if (mine == subject.rows.end() || mine->second.size() != row.size()) continue;
    grid.positions.push_back(position);
    std::vector<double>& scores = grid.scores.emplace_back();
    const size_t part = row.size() / static_cast<size_t>(heads);
    for (size_t begin = 0; begin < row.size(); begin += part) {
      scores.push_back(relative(mine->second.subspan(begin, part), row.subspan(begin, part), usual.head) /
                       floor_of(*reference.event));
    }
  }
  return grid;
}

void Comparison::leave_out_ties(const Joined& subject, const Joined* own, const Joined& weights,
                                const Joined& logits) {
  const TraceEvent& event = *weights.event;
  const double floor = floor_of(*logits.event);
  for (const auto& [position, row] : weights.rows) {
    const auto mine = subject.rows.find(position);
    const auto scores = logits.rows.find(position);
    if (mine == subject.rows.end() || scores == logits.rows.end() || mine->second.size() != row.size() ||
        scores->second.size() != row.size() || excluded(event.row, position))
      continue;
    const auto margin = exchanged_by(mine->second, row, scores->second);
    if (!margin || *margin > tie_margin(floor, scores->second)) continue;
    if (own != nullptr) {
      const auto known = own->rows.find(position);
      if (known != own->rows.end() && !chosen_by(mine->second, known->second)) continue;
    }
    report_.notes.push_back(
        fmt::format("tie: {}, position {}, experts chosen by a margin of {:.2g}; left out from there",
                    event.name(), position, *margin));
    const auto [known, is_new] = excluded_.emplace(event.row, position);
    if (!is_new) known->second = std::min(known->second, position);
  }
}

void Comparison::judge_ties(std::span<const Trace::Tie> ties, const Joined& weights, const Joined& logits,
                            SiteScore& score) {
  const double floor = floor_of(*logits.event);
  for (const Trace::Tie& aside : ties) {
    const auto row = weights.rows.find(aside.position);
    const auto scores = logits.rows.find(aside.position);
    if (aside.step != score.step || aside.row != score.row || aside.layer != score.layer ||
        row == weights.rows.end() || scores == logits.rows.end() ||
        row->second.size() != scores->second.size())
      continue;
    std::vector<float> choice(row->second.size());
    for (const int expert : aside.experts)
      if (static_cast<size_t>(expert) < choice.size()) choice[static_cast<size_t>(expert)] = 1;
    const auto margin = exchanged_by(choice, row->second, scores->second);
    if (!margin) continue;
    const double size = std::max(norm(scores->second), 1e-30);
    const bool tie = *margin <= tie_margin(floor, scores->second);
    report_.notes.push_back(
        fmt::format("{}: {}, position {}, experts chosen by a margin of {:.2g}; computed on with the "
                    "reference's",
                    tie ? "tie" : "no tie", weights.event->name(), aside.position, *margin));
    if (tie) continue;
    score.first_bad = score.first_bad < 0 ? aside.position : std::min(score.first_bad, aside.position);
    if (*margin / (size * floor) < score.score) continue;
    score.of_choice = true;
    score.error = *margin / size;
    score.floor = floor;
    score.score = score.error / floor;
    score.token = aside.position;
  }
}

void Comparison::note_argmax(const Joined& subject, const Joined& reference) {
  if (reference.event->width != 0 || subject.event->width != 0) return;
  for (const auto& [position, row] : reference.rows) {
    const auto mine = subject.rows.find(position);
    if (mine == subject.rows.end() || mine->second.size() != row.size()) continue;
    const auto theirs = std::ranges::max_element(row) - row.begin();
    const auto ours = std::ranges::max_element(mine->second) - mine->second.begin();
    if (ours == theirs) continue;
    const double margin = row[static_cast<size_t>(theirs)] - row[static_cast<size_t>(ours)];
    report_.notes.push_back(
        fmt::format("step {}, sequence {}: the likeliest token flips from {} to {} (margin {:.3g}{})",
                    reference.event->step, reference.event->row, theirs, ours, margin,
                    margin <= kBand * floor_of(*reference.event) * norm(row) ? ", a tie" : ""));
    return;
  }
}

std::string no_floor(const Floor& floor, const std::string& policy) {
  if (!floor.policy().empty() || policy == "f32/f32") return {};
  return "no floor for policy " + policy + ": measure one, or judge by that of another with --policy";
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
  const bool enough = 2 * report.left_out <= report.rows;
  if (!report.first) {
    report.verdict = covered && enough ? Verdict::within : Verdict::inconclusive;
    report.reason = !enough   ? "no difference, but too few rows are left after ties of the router"
                    : covered ? "every site is within the floor"
                              : "no difference, but not every site could be compared";
    if (report.left_out > 0)
      report.reason += fmt::format(" ({} of {} rows were left out)", report.left_out, report.rows);
    return;
  }
  report.verdict = Verdict::divergent;
  const SiteScore& first = *report.first;
  report.reason =
      fmt::format("{} step {}, sequence {}, {}, position {}", first.step == 0 ? "prefill," : "decode,",
                  first.step, first.row, first.name(), first.first_bad);
}

}  // namespace lockstep

// Whether an error shows in the sites that are computed from it.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <set>

#include "trace/compare.h"

namespace lockstep {
namespace {

// How an error of its input shows in a site: a residual sum keeps the difference as it is, a norm, product or
// rotation keeps about its relative size, and attention and the choice of experts may keep little of it.
enum class Path { sum, linear, mixed };

struct Step {
  Site to;
  Path path;
  bool next_layer = false;
};

// The sites computed from one, in every architecture: those that a model lacks are passed over.
const std::vector<Step>& steps_from(Site site) {
  static const std::map<Site, std::vector<Step>> all = {
      {Site::embed, {{Site::attn_norm, Path::linear, true}, {Site::attn_resid, Path::sum, true}}},
      {Site::attn_norm,
       {{Site::q_proj, Path::linear}, {Site::k_proj, Path::linear}, {Site::v_proj, Path::linear}}},
      {Site::q_proj, {{Site::q_norm, Path::linear}, {Site::q_rope, Path::linear}}},
      {Site::k_proj, {{Site::k_norm, Path::linear}, {Site::k_rope, Path::linear}}},
      {Site::v_proj, {{Site::v_cache, Path::linear}, {Site::attn_ctx, Path::linear}}},
      {Site::q_norm, {{Site::q_rope, Path::linear}}},
      {Site::k_norm, {{Site::k_rope, Path::linear}}},
      {Site::q_rope, {{Site::scores, Path::mixed}}},
      {Site::k_rope, {{Site::k_cache, Path::linear}, {Site::scores, Path::mixed}}},
      {Site::k_cache, {{Site::scores, Path::mixed}}},
      {Site::v_cache, {{Site::attn_ctx, Path::linear}}},
      {Site::scores, {{Site::probs, Path::mixed}}},
      {Site::probs, {{Site::attn_ctx, Path::mixed}}},
      {Site::attn_ctx, {{Site::o_proj, Path::linear}}},
      {Site::o_proj, {{Site::attn_post_norm, Path::linear}, {Site::attn_resid, Path::sum}}},
      {Site::attn_post_norm, {{Site::attn_resid, Path::sum}}},
      {Site::attn_resid, {{Site::ffn_norm, Path::linear}, {Site::ffn_resid, Path::sum}}},
      {Site::ffn_norm,
       {{Site::router_logits, Path::linear},
        {Site::expert_gate, Path::linear},
        {Site::expert_up, Path::linear},
        {Site::gate, Path::linear},
        {Site::up, Path::linear}}},
      {Site::router_logits, {{Site::router_weights, Path::mixed}}},
      {Site::router_weights,
       {{Site::expert_gate, Path::linear}, {Site::expert_up, Path::linear}, {Site::moe_out, Path::linear}}},
      {Site::expert_gate, {{Site::expert_act, Path::linear}}},
      {Site::expert_up, {{Site::expert_act, Path::linear}}},
      {Site::expert_act, {{Site::expert_down, Path::linear}}},
      {Site::expert_down, {{Site::moe_out, Path::linear}}},
      {Site::gate, {{Site::act, Path::linear}}},
      {Site::up, {{Site::act, Path::linear}}},
      {Site::act, {{Site::down, Path::linear}}},
      {Site::down, {{Site::ffn_post_norm, Path::linear}, {Site::ffn_resid, Path::sum}}},
      {Site::moe_out, {{Site::ffn_post_norm, Path::linear}, {Site::ffn_resid, Path::sum}}},
      {Site::ffn_post_norm, {{Site::ffn_resid, Path::sum}}},
      {Site::ffn_resid, {{Site::attn_norm, Path::linear, true}, {Site::attn_resid, Path::sum, true}}},
      {Site::final_norm, {{Site::logits, Path::linear}}},
      {Site::logits, {}}};
  return all.at(site);
}

struct Successor {
  const SiteScore* score;
  Path path;
};

// The nearest sites computed from one that were compared in its pass.
class Successors {
 public:
  explicit Successors(const DiffReport& report) : first_(*report.first) {
    for (const SiteScore& each : report.scores) {
      if (each.step != first_.step || each.row != first_.row) continue;
      const auto site = find_site(each.site);
      if (site) scores_.emplace(std::pair(each.layer, *site), &each);
      last_layer_ = std::max(last_layer_, each.layer);
    }
  }
  std::vector<Successor> all() {
    if (const auto site = find_site(first_.site)) follow(*site, first_.layer, {});
    return found_;
  }

 private:
  // `instead`: how what was passed over shows, which is at most what is known of it.
  void follow(Site site, int layer, std::optional<Path> instead) {
    if (!seen_.emplace(layer, site).second) return;
    for (const Step& step : steps_from(site))
      take(step.to, step.next_layer ? layer + 1 : layer, instead.value_or(step.path));
    if (site == Site::ffn_resid && layer >= last_layer_)
      take(Site::final_norm, kNoLayer, instead.value_or(Path::linear));
  }
  void take(Site site, int layer, Path path) {
    const auto known = scores_.find({layer, site});
    if (known != scores_.end()) {
      found_.push_back({known->second, path});
    } else if (layer <= last_layer_) {
      follow(site, layer, Path::mixed);
    }
  }

  const SiteScore& first_;
  int last_layer_ = kNoLayer;
  std::map<std::pair<int, Site>, const SiteScore*> scores_;
  std::set<std::pair<int, Site>> seen_;
  std::vector<Successor> found_;
};

// The relative error that a sum has if the difference of a summand is its own.
double carried(const Joined& mine, const Joined& theirs, const Joined& sum) {
  const Sizes usual = usual_sizes(sum, 0);
  double most = 0;
  for (const auto& [position, row] : theirs.rows) {
    const auto other = mine.rows.find(position);
    const auto into = sum.rows.find(position);
    if (other == mine.rows.end() || into == sum.rows.end() || into->second.size() != row.size()) continue;
    most = std::max(most, relative(other->second, row, 0) * std::max(norm(row), 1e-30) /
                              std::max({norm(into->second), 0.1 * usual.row, 1e-30}));
  }
  return most;
}

// What of other weights of a router must show: in an expert that only one side chose, all of it, and in their
// sum over the experts, which may compute alike, what it is apart.
double routed(const Joined& mine, const Joined& theirs, const Joined& next) {
  const bool summed = next.event->site == "moe_out";
  double most = 0;
  const auto sum = [](std::span<const float> row) { return std::accumulate(row.begin(), row.end(), 0.0); };
  const auto same_choice = [](float a, float b) { return (a != 0) == (b != 0); };
  for (const auto& [position, row] : theirs.rows) {
    const auto other = mine.rows.find(position);
    if (other == mine.rows.end()) continue;
    const double apart = summed
                             ? std::abs(sum(other->second) - sum(row)) / std::max(std::abs(sum(row)), 1e-30)
                         : std::ranges::equal(other->second, row, same_choice) ? 0
                                                                               : 1;
    most = std::max(most, apart);
  }
  return most;
}

// Of the first error, what can show in its successors: queries and keys of a row that sees one key cannot, as
// all of the weight is that key's.
double telling_error(const SiteScore& first, const Joined& mine, const Joined& theirs) {
  if (!first.site.starts_with("q_") && !first.site.starts_with("k_") && first.site != "scores")
    return first.error;
  const Sizes usual = usual_sizes(theirs, 0);
  double most = 0;
  for (const auto& [position, row] : theirs.rows) {
    const auto other = mine.rows.find(position);
    if (position > 0 && other != mine.rows.end())
      most = std::max(most, relative(other->second, row, usual.row));
  }
  return most;
}

// The least error that a successor has if the first was computed with: a tenth of what sums carry, and of the
// error itself a twentieth in products and a hundredth in attention and routing. Starting values on the low
// side: above them a real fault would pass for a wrong capture.
double least_inherited(const SiteScore& first, const Joined& mine, const Joined& theirs, const Joined& next,
                       Path path) {
  if (path == Path::sum) return 0.1 * carried(mine, theirs, next);
  const double error =
      first.site == "router_weights" ? routed(mine, theirs, next) : telling_error(first, mine, theirs);
  return error * (path == Path::linear ? 0.05 : 0.01);
}

}  // namespace

Inheritance inheritance(const DiffReport& report, const Floor& floor, const std::map<Place, Joined>& ours,
                        const std::map<Place, Joined>& theirs) {
  constexpr double kNoise = 3;  // times the floor as measured: nearer to it an error may be any
  const SiteScore& first = *report.first;
  const Place place = place_of(first.step, first.layer, first.site, first.row);
  const Joined &mine = ours.at(place), &known = theirs.at(place);
  bool missing = false;
  for (const auto& [score, path] : Successors(report).all()) {
    const Joined& next = theirs.at(place_of(score->step, score->layer, score->site, score->row));
    const double least = least_inherited(first, mine, known, next, path);
    if (score->error < least)
      missing = true;
    else if (score->error > kNoise * floor.at(score->step > 0, score->name(), score->width))
      return Inheritance::shown;
  }
  return missing ? Inheritance::missing : Inheritance::unknown;
}

const SiteScore* differing_successor(const DiffReport& report) {
  for (const auto& [score, path] : Successors(report).all()) {
    if (score->score > kBand) return score;
  }
  return nullptr;
}

}  // namespace lockstep

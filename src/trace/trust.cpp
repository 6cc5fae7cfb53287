// What a trace tells against itself, and whether two are of the same computation.
#include <algorithm>
#include <cmath>

#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"
#include "trace/inject.h"
#include "trace/ties.h"

namespace lockstep {
namespace {

// Sites of layer 0 that follow from the token alone: equal tokens, equal tensors.
bool of_token_alone(const TraceEvent& event) {
  static constexpr Site kSites[] = {Site::embed,  Site::attn_norm, Site::q_proj, Site::k_proj,
                                    Site::v_proj, Site::q_norm,    Site::k_norm, Site::v_cache};
  return event.layer <= 0 && std::ranges::find(kSites, *find_site(event.site)) != std::end(kSites);
}

// Sites of layer 0 that follow from token and position, whatever came before.
bool of_token_and_position(const TraceEvent& event) {
  static constexpr Site kSites[] = {Site::q_rope, Site::k_rope, Site::k_cache};
  return event.layer <= 0 && std::ranges::find(kSites, *find_site(event.site)) != std::end(kSites);
}

// Prompt and what was fed, up to the last position of an event.
std::vector<int32_t> tokens_up_to(const Trace& trace, const TraceEvent& event) {
  const Trace::Sequence& sequence = trace.sequences.at(static_cast<size_t>(event.row));
  std::vector<int32_t> tokens = sequence.ids;
  tokens.insert(tokens.end(), sequence.fed.begin(), sequence.fed.end());
  const auto end = static_cast<size_t>(std::max<int64_t>(0, event.first_position + event.shape[0]));
  tokens.resize(std::min(tokens.size(), end));
  return tokens;
}

// Whether two passes computed the same: equal tokens so far. A text of one token repeated has few other
// values.
bool same_tokens(const Trace& trace, const TraceEvent& one, const TraceEvent& other) {
  std::vector<int32_t> a = tokens_up_to(trace, one), b = tokens_up_to(trace, other);
  if (of_token_and_position(one)) {
    const auto own = [](std::vector<int32_t>& tokens, const TraceEvent& event) {
      tokens.erase(tokens.begin(),
                   tokens.begin() + std::min<ptrdiff_t>(event.first_position, std::ssize(tokens)));
    };
    own(a, one);
    own(b, other);
  }
  if (a == b) return one.first_position == other.first_position;
  const auto repeated = [&](int32_t id) { return id == a.front(); };
  return !a.empty() && std::ranges::all_of(a, repeated) && std::ranges::all_of(b, repeated);
}

std::string non_finite(const Trace& trace) {
  for (const TraceEvent& event : trace.events()) {
    if (!std::ranges::all_of(event.values, [](float v) { return std::isfinite(v); }))
      return fmt::format("{} of step {} holds NaN or infinity", event.name(), event.step);
  }
  return {};
}

// The same tensor in two layers, or in two passes over other tokens.
std::string repeats(const Trace& trace) {
  std::map<std::pair<std::string, std::string>, const TraceEvent*> first;  // of a site and hash
  for (const TraceEvent& event : trace.events()) {
    // A choice among few may well be the same elsewhere, and one key has all of the weight.
    if (event.axes == "T E" || event.site == "probs") continue;
    const auto [known, is_new] = first.emplace(std::pair(event.site, event.hash), &event);
    const TraceEvent& other = *known->second;
    if (is_new) continue;
    if (other.layer != event.layer)
      return fmt::format("{} of step {} is the very same as in layer {}: recorded twice?", event.name(),
                         event.step, other.layer);
    if (of_token_alone(event) || same_tokens(trace, event, other)) continue;
    return fmt::format(
        "{} of step {}, sequence {} is the very same as of step {}, sequence {}, whose tokens are others: "
        "recorded twice?",
        event.name(), event.step, event.row, other.step, other.row);
  }
  return {};
}

// Embeddings follow from the token alone.
std::string embeddings(const Trace& trace) {
  constexpr double kRounding = 1e-6;
  std::map<int32_t, std::pair<std::span<const float>, int64_t>> known;  // of a token: row, position
  for (const TraceEvent& event : trace.events()) {
    if (event.site != "embed") continue;
    const std::vector<int32_t> tokens = tokens_up_to(trace, event);
    const auto width = event.values.size() / static_cast<size_t>(event.shape[0]);
    for (int64_t t = 0; t < event.shape[0]; ++t) {
      const int64_t position = event.first_position + t;
      if (position >= static_cast<int64_t>(tokens.size())) break;
      const int32_t id = tokens[static_cast<size_t>(position)];
      const auto row = event.values.subspan(static_cast<size_t>(t) * width, width);
      const auto [found, is_new] = known.emplace(id, std::pair(row, position));
      if (is_new) continue;
      const auto& [before, at] = found->second;
      if (before.size() != row.size() || relative(row, before, 0) > kRounding)
        return fmt::format("embed of step {}, sequence {}: token {} at position {} is not what it was at {}",
                           event.step, event.row, id, position, at);
    }
  }
  return {};
}

using Rows = std::map<Place, Joined>;
const Joined* find(const Rows& all, int step, int layer, const char* site, int row) {
  const auto found = all.find(place_of(step, layer, site, row));
  return found == all.end() ? nullptr : &found->second;
}

// |x + y - z| of the worst row, relative to the largest of the three; nothing: they cannot be added.
std::optional<double> sum_error(const Joined& x, const Joined& y, const Joined& z) {
  double worst = 0;
  for (const auto& [position, sum] : z.rows) {
    const auto a = x.rows.find(position), b = y.rows.find(position);
    if (a == x.rows.end() || b == y.rows.end() || a->second.size() != sum.size() ||
        b->second.size() != sum.size())
      return {};
    double off = 0;
    for (size_t i = 0; i < sum.size(); ++i)
      off += std::pow(static_cast<double>(a->second[i]) + b->second[i] - sum[i], 2);
    const double size = std::max({norm(a->second), norm(b->second), norm(sum), 1e-30});
    worst = std::max(worst, std::sqrt(off) / size);
  }
  return worst;
}

// Residual sums that are none, in a trace where most are: those of a model that adds otherwise are all wrong.
std::string sums(const Trace& trace) {
  constexpr double kRounding = 1e-6;  // of three tensors in f32
  const Rows all = join(trace);
  int64_t held = 0, broken = 0;
  std::string first;
  for (const auto& [place, joined] : all) {
    const TraceEvent& event = *joined.event;
    const bool after_attention = event.site == "attn_resid";
    if (!after_attention && event.site != "ffn_resid") continue;
    const auto at = [&](int layer, const char* site) {
      return find(all, event.step, layer, site, event.row);
    };
    const Joined* before = !after_attention   ? at(event.layer, "attn_resid")
                           : event.layer == 0 ? at(kNoLayer, "embed")
                                              : at(event.layer - 1, "ffn_resid");
    const Joined* branch = nullptr;
    for (const char* site : {after_attention ? "attn_post_norm" : "ffn_post_norm",
                             after_attention ? "o_proj" : "moe_out", after_attention ? "o_proj" : "down"}) {
      if (branch == nullptr) branch = at(event.layer, site);
    }
    if (before == nullptr || branch == nullptr) continue;
    const auto error = sum_error(*before, *branch, joined);
    if (!error) continue;
    ++(*error <= kRounding ? held : broken);
    if (*error > kRounding && first.empty())
      first = fmt::format("{} of step {}, sequence {} is not the sum of {} and {}", event.name(), event.step,
                          event.row, before->event->name(), branch->event->name());
  }
  return held > broken ? first : "";
}

std::string routers(const Trace& trace) {
  for (const TraceEvent& event : trace.events()) {
    if (event.site != "router_weights") continue;
    const auto experts = static_cast<size_t>(event.shape[event.shape.rank() - 1]);
    for (size_t row = 0; row < event.values.size(); row += experts) {
      const auto weights = event.values.subspan(row, experts);
      if (std::ranges::any_of(weights, [](float w) { return w < 0; }) ||
          std::ranges::all_of(weights, [](float w) { return w == 0; }))
        return fmt::format(
            "{} of step {}, sequence {}: expected weights of some experts, got none or negative",
            event.name(), event.step, event.row);
    }
  }
  return {};
}

// Choices that are not the best by the trace's own logits, in a trace where most are: a router that chooses
// otherwise, by a bias say, does so in most rows.
std::string choices(const Trace& trace) {
  const Rows all = join(trace);
  int64_t held = 0, broken = 0;
  std::string first;
  for (const auto& [place, weights] : all) {
    const TraceEvent& event = *weights.event;
    if (event.site != "router_weights") continue;
    const Joined* logits = find(all, event.step, event.layer, "router_logits", event.row);
    if (logits == nullptr) continue;
    for (const auto& [position, row] : weights.rows) {
      const auto scores = logits->rows.find(position);
      if (scores == logits->rows.end() || scores->second.size() != row.size()) continue;
      const bool right = chosen_by(row, scores->second);
      ++(right ? held : broken);
      if (!right && first.empty())
        first = fmt::format("{} of step {}, sequence {}, position {} chooses others than its router_logits",
                            event.name(), event.step, event.row, position);
    }
  }
  return held > broken ? first : "";
}

// Lengths of rows that are the model's own: residual stream, vocabulary, experts. Heads may be laid out
// otherwise by an engine.
std::map<std::string, int64_t> widths(const Trace& trace) {
  static constexpr Site kSites[] = {Site::embed,         Site::attn_resid, Site::ffn_resid,
                                    Site::router_logits, Site::final_norm, Site::logits};
  std::map<std::string, int64_t> all;
  for (const TraceEvent& event : trace.events()) {
    if (std::ranges::find(kSites, *find_site(event.site)) != std::end(kSites))
      all.emplace(event.site, row_width(event));
  }
  return all;
}

// llama.cpp calls several architectures that compute alike by one name.
bool same_architecture(const Trace& one, const Trace& other) {
  const auto is = [&](const char* a, const char* b) {
    return (one.architecture == a && other.architecture == b) ||
           (one.architecture == b && other.architecture == a);
  };
  return one.architecture.empty() || other.architecture.empty() || one.architecture == other.architecture ||
         is("llama", "mistral") || is("llama", "mixtral");
}

bool has_experts(const Trace& trace) {
  return std::ranges::any_of(trace.events(), [](const TraceEvent& event) { return event.axes == "T E"; });
}
bool has_dense_layers(const Trace& trace) {
  return std::ranges::any_of(trace.events(), [](const TraceEvent& event) { return event.site == "down"; });
}

}  // namespace

std::string self_check(const Trace& trace) {
  for (const auto check : {non_finite, repeats, embeddings, routers, choices, sums}) {
    if (const std::string problem = check(trace); !problem.empty()) return trace.where + ": " + problem;
  }
  return {};
}

std::string same_model(const Trace& subject, const Trace& reference) {
  if (!same_architecture(subject, reference))
    return fmt::format("the models differ: {}, and {} in the reference", subject.architecture,
                       reference.architecture);
  if (subject.layers > 0 && reference.layers > 0 && subject.layers != reference.layers)
    return fmt::format("the models differ: {} layers, and {} in the reference", subject.layers,
                       reference.layers);
  if ((has_experts(subject) && has_dense_layers(reference)) ||
      (has_experts(reference) && has_dense_layers(subject)))
    return "the models differ: one has experts, the other has none";
  const auto mine = widths(subject);
  for (const auto& [site, width] : widths(reference)) {
    const auto found = mine.find(site);
    if (found != mine.end() && found->second != width)
      return fmt::format("the models differ: rows of {} numbers at {}, and {} in the reference",
                         found->second, site, width);
  }
  return {};
}

std::string same_model(const ModelFacts& facts, const Trace& reference) {
  Trace mine;
  mine.architecture = facts.checkpoint->architecture();
  mine.layers = facts.layers;
  if (std::string problem = same_model(mine, reference); !problem.empty()) return problem;
  if (facts.experts > 0 ? has_dense_layers(reference) : has_experts(reference))
    return "the models differ: one has experts, the other has none";
  for (const auto& [site, width] : widths(reference)) {
    const int64_t own = site == "router_logits" ? facts.experts : site == "logits" ? width : facts.hidden;
    if (own != width)
      return fmt::format("the models differ: rows of {} numbers at {}, and {} in the reference", own, site,
                         width);
  }
  return {};
}

std::string unusable(const std::filesystem::path& model, const TraceOptions& options, const Trace& reference,
                     const Floor& floor) {
  const Checkpoint checkpoint = Checkpoint::open(model);
  const ModelFacts facts(checkpoint);
  const std::string policy =
      fmt::format("{}/{}", precision_name(options.model.precision), kv_type_name(options.kv_type));
  // Which of ours it was: without -m it is one that nobody named.
  std::string other = same_model(facts, reference);
  if (!other.empty()) other += "; ours is " + model.string();
  for (const std::string& problem :
       {other, floor.other_model(reference), no_floor(floor, policy), self_check(reference),
        same_weights(weight_sums(checkpoint), reference)}) {
    if (!problem.empty()) return problem;
  }
  return {};
}

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
  const auto reduced = [](const Trace& trace) { return trace.storage.kind != TraceStorage::Kind::full; };
  if (reduced(subject) && reduced(reference) && subject.storage != reference.storage)
    return "the traces keep other columns: record one with the other's --store and --seed";
  if (const std::string problem = same_model(subject, reference); !problem.empty()) return problem;
  return same_weights(subject.weights_sha256, reference);
}

std::string same_weights(const std::map<std::string, std::string>& sums, const Trace& reference) {
  for (const auto& [file, sum] : reference.weights_sha256) {
    const auto mine = sums.find(file);
    if (mine != sums.end() && mine->second != sum) return "the weights differ: " + file;
  }
  return {};
}

}  // namespace lockstep

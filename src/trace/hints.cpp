// What the pattern of an error often means, with the observation it rests on.
#include <algorithm>
#include <cmath>

#include "tensor/fail.h"
#include "trace/compare.h"

namespace lockstep {
namespace {

struct Fit {
  double factor = 0, offset = 0;
  double factor_left = 1, offset_left = 1;  // share of the error that is left after it
};

// subject = factor * reference, and subject = reference + one row that is the same for every token.
Fit fit(const Joined& subject, const Joined& reference) {
  double xy = 0, xx = 0, error = 0;
  std::vector<double> mean;
  int64_t rows = 0;
  for (const auto& [position, truth] : reference.rows) {
    const auto& mine = subject.rows.at(position);
    mean.resize(truth.size());
    ++rows;
    for (size_t i = 0; i < truth.size(); ++i) {
      const double difference = static_cast<double>(mine[i]) - truth[i];
      xy += static_cast<double>(mine[i]) * truth[i];
      xx += static_cast<double>(truth[i]) * truth[i];
      error += difference * difference;
      mean[i] += difference;
    }
  }
  if (rows == 0 || xx == 0 || error == 0) return {};
  Fit result;
  result.factor = xy / xx;
  double after_factor = 0, after_offset = 0, size = 0;
  for (const auto& [position, truth] : reference.rows) {
    const auto& mine = subject.rows.at(position);
    for (size_t i = 0; i < truth.size(); ++i) {
      after_factor += std::pow(mine[i] - result.factor * truth[i], 2);
      after_offset += std::pow(mine[i] - truth[i] - mean[i] / static_cast<double>(rows), 2);
    }
  }
  for (const double each : mean) size += std::pow(each / static_cast<double>(rows), 2);
  result.offset = std::sqrt(size);
  result.factor_left = std::sqrt(after_factor / error);
  result.offset_left = rows > 1 ? std::sqrt(after_offset / error) : 1;
  return result;
}

// Of the columns of each head, or of a row without heads: which are wrong in some row.
std::vector<bool> bad_columns(const SiteScore& first, const Joined& subject, const Joined& reference) {
  const TraceEvent& event = *reference.event;
  const auto heads = static_cast<size_t>(std::max<int64_t>(1, heads_of(event)));
  const size_t width = reference.rows.begin()->second.size() / heads;
  std::vector<double> error(width), size(width);
  for (const auto& [position, truth] : reference.rows) {
    const auto& mine = subject.rows.at(position);
    for (size_t i = 0; i < truth.size(); ++i) {
      error[i % width] += std::pow(static_cast<double>(mine[i]) - truth[i], 2);
      size[i % width] += std::pow(static_cast<double>(truth[i]), 2);
    }
  }
  std::vector<bool> bad(width);
  for (size_t i = 0; i < width; ++i)
    bad[i] = std::sqrt(error[i]) > kBand * first.floor * std::max(std::sqrt(size[i]), 1e-30);
  return bad;
}

// Errors in the rows of this pass, from the first token to the last: do they grow with the position?
bool grows(const Joined& subject, const Joined& reference) {
  const Sizes usual = usual_sizes(reference, 1);
  std::vector<double> errors;
  for (const auto& [position, truth] : reference.rows)
    errors.push_back(relative(subject.rows.at(position), truth, usual.row));
  if (errors.size() < 6) return false;
  const size_t third = errors.size() / 3;
  const auto mean = [&](size_t begin) {
    double sum = 0;
    for (size_t i = begin; i < begin + third; ++i) sum += errors[i];
    return sum / static_cast<double>(third);
  };
  return mean(0) < mean(third) && mean(third) < mean(errors.size() - third);
}

// What the place alone suggests.
std::string by_place(const SiteScore& first) {
  const bool rope = first.site == "q_rope" || first.site == "k_rope";
  const bool some = !first.bad_heads.empty() && first.bad_heads.size() < first.heads.size();
  if (rope && first.step > 0 && some && first.bad_heads[0] == 1)
    return "only heads from 1 on, only in decode: RoPE given reshaped heads with L = 1 (mlx#3494)";
  if (rope && first.step > 0 && first.row > 0)
    return "only later rows of the batch, only in decode: RoPE offset with B > 1";
  if (rope && first.step > 0) return "prefill is right, decode is not: position or offset of the new token";
  if (rope && first.first_bad == 0)
    return "wrong from position 0 on: a factor of Q and K, or the layout of a head";
  if (rope) return "right at position 0, wrong after: base, scaling, rotated dimensions or layout";
  if (first.site == "q_proj" || first.site == "k_proj" || first.site == "v_proj")
    return "weights or bias of the projection, or the order of its rows";
  if (first.site.ends_with("_cache"))
    return "the projection is right, the cache is not: what is written, where, or its element type";
  if (first.site == "scores" && some) return "some heads only: which KV head a query head uses";
  if (first.site == "scores") return "scale, precision or mask of Q K^T";
  if (first.site == "attn_ctx" && some) return "some heads only: which KV head a query head uses";
  if (first.site == "attn_ctx" && first.first_bad > 0)
    return "right up to position " + std::to_string(first.first_bad - 1) +
           ": window, mask or what the cache keeps";
  if (first.site.starts_with("router")) return "the router: softmax, top-k or renormalisation";
  if (first.site.starts_with("expert_") && first.bad_heads.size() == 1)
    return "only expert " + std::to_string(first.bad_heads[0]) + ": its weights, or its dispatch";
  if (first.site == "moe_out" || first.site.starts_with("expert_"))
    return "routing is right: which expert computes which rows, or an expert's weights";
  if (first.site.ends_with("norm")) return "the norm: epsilon, weight or its order of casts";
  if (first.site == "embed") return "the embedding: a scale, or another table";
  return "";
}

}  // namespace

std::vector<std::string> hints(const SiteScore& first, const Joined& subject, const Joined& reference) {
  std::vector<std::string> all;
  const auto add = [&](std::string text) {
    if (!text.empty()) all.push_back(std::move(text));
  };
  for (const auto& [position, row] : subject.rows) {
    if (std::ranges::all_of(row, [](float x) { return std::isfinite(x); })) continue;
    add(fmt::format("NaN or infinity from position {} on", position));
    break;
  }
  add(first.finding);
  const Fit fitted = fit(subject, reference);
  if (fitted.factor_left < 0.05)
    add(fmt::format(
        "{:.6g} times the reference everywhere: a scale (of the embedding, the norm, YaRN's factor)",
        fitted.factor));
  if (fitted.offset_left < 0.05) add("the same difference at every token: a bias");
  const std::vector<bool> bad = bad_columns(first, subject, reference);
  const auto count = std::ranges::count(bad, true);
  const auto width = static_cast<int64_t>(bad.size());
  const bool whole = !is_reduced(subject, reference);
  if (whole && !first.heads.empty() && count > 0 && count <= width / 2 && width >= 4)
    add(fmt::format("{} of {} dimensions of a head: partial rotation, or only half of a head", count, width));
  if (whole && first.heads.empty() && count > 0 && count < width / 2) {
    std::vector<int64_t> at;
    for (int64_t i = 0; i < width; ++i)
      if (bad[static_cast<size_t>(i)]) at.push_back(i);
    for (const int64_t block : {256, 64, 32}) {
      const bool aligned = std::ranges::all_of(at, [&](int64_t i) { return i % block == at[0] % block; });
      if (aligned && at.size() > 1) {
        add(fmt::format("only column {} of every {}: a block of a quantised weight", at[0] % block, block));
        break;
      }
    }
  }
  add(by_place(first));
  // One key has a weight of 1 however it was turned, so attention shows a wrong rotation from position 1 on;
  // what begins later is a window or the cache.
  const bool rotated = first.site == "q_rope" || first.site == "k_rope" || first.site == "scores" ||
                       (first.site == "attn_ctx" && first.first_bad <= 1);
  if (rotated && grows(subject, reference)) add("the error grows with the position: base or scaling of RoPE");
  return all;
}

}  // namespace lockstep

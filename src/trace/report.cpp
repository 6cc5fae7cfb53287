// Reports of a comparison: one terminal screen, JSON, one HTML file.
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>

#include "format/write_file.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

using nlohmann::json;

std::string_view verdict_name(Verdict verdict) {
  switch (verdict) {
    case Verdict::within: return "within";
    case Verdict::divergent: return "divergent";
    default: return "inconclusive";
  }
}

std::string_view band_name(double score) {
  if (score == 0) return "equal";
  if (score <= 1) return "within";
  if (score <= 4) return "noisy";
  return score <= kBand ? "suspicious" : "divergent";
}

// "0, 2-5 of 8"
std::string head_list(const SiteScore& score) {
  std::string text;
  const std::vector<int>& bad = score.bad_heads;
  for (size_t i = 0; i < bad.size();) {
    size_t last = i;
    while (last + 1 < bad.size() && bad[last + 1] == bad[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(bad[i]) +
            (last > i ? "-" + std::to_string(bad[last]) : "");
    i = last + 1;
  }
  if (bad.empty()) return score.heads.empty() ? "" : "none";
  return bad.size() == score.heads.size() ? "all " + std::to_string(bad.size())
                                          : text + " of " + std::to_string(score.heads.size());
}

std::string phase(const SiteScore& score) {
  return score.step == 0 ? "prefill" : "decode step " + std::to_string(score.step);
}

json as_json(const SiteScore& score) {
  return {{"phase", score.step == 0 ? "prefill" : "decode"},
          {"step", score.step},
          {"row", score.row},
          {"layer", score.layer == kNoLayer ? json() : json(score.layer)},
          {"site", score.site},
          {"name", score.name()},
          {"error", std::isfinite(score.error) ? json(score.error) : json("inf")},
          {"floor", score.floor},
          {"score", std::isfinite(score.score) ? json(score.score) : json("inf")},
          {"band", band_name(score.score)},
          {"position", score.token},
          {"first_bad_position", score.first_bad},
          {"heads", score.bad_heads},
          {"head_scores", score.heads},
          {"finding", score.finding}};
}

// "scores, probs": sites that could not be compared, whatever their layer.
std::string unmatched_sites(const std::vector<Unmatched>& unmatched) {
  std::vector<std::string> names;
  for (const Unmatched& each : unmatched) {
    std::string site = each.name.substr(each.name.find('.') + 1);
    if (std::ranges::find(names, site) == names.end()) names.push_back(std::move(site));
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

// " or near it (2 noisy, 1 suspicious; ...)": what is within the band, but beyond the floor.
std::string beyond_floor(const std::vector<SiteScore>& scores) {
  const auto count = [&](std::string_view band) {
    return std::ranges::count_if(scores,
                                 [&](const SiteScore& each) { return band_name(each.score) == band; });
  };
  const auto noisy = count("noisy"), suspicious = count("suspicious");
  if (noisy + suspicious == 0) return {};
  std::string text = noisy > 0 ? fmt::format("{} noisy", noisy) : "";
  if (suspicious > 0) text += fmt::format("{}{} suspicious", text.empty() ? "" : ", ", suspicious);
  return fmt::format(" or near it ({}; noisy: up to 4 x the floor, suspicious: up to {:g} x)", text, kBand);
}

// Which scores a screen has room for, in causal order: what is around the first error; of a replay, whose
// errors are each an operation's own, those alone; of a clean run the largest.
std::vector<size_t> rows_shown(const DiffReport& report) {
  constexpr size_t kRows = 14;
  std::vector<size_t> rows(report.scores.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  const auto divergent = [&](size_t i) { return report.scores[i].score > kBand; };
  if (report.first && report.alone) {
    std::erase_if(rows, [&](size_t i) { return !divergent(i); });
  } else if (report.first) {
    const auto first = std::ranges::find_if(rows, divergent) - rows.begin();
    rows.erase(rows.begin(), rows.begin() + std::max<int64_t>(0, first - 5));
  } else {
    std::ranges::stable_sort(rows, std::greater(), [&](size_t i) { return report.scores[i].score; });
  }
  rows.resize(std::min(rows.size(), kRows));
  std::ranges::sort(rows);
  return rows;
}

std::string heat_colour(double score) {
  const double level = std::clamp(std::log2(std::max(score, 1e-3)) / 10 + 0.4, 0.0, 1.0);
  return fmt::format("hsl({:.0f},70%,{:.0f}%)", 120 * (1 - level), 88 - 38 * level);
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text)
    out += c == '<' ? "&lt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
  return out;
}

}  // namespace

std::string report_text(const DiffReport& report, bool colour) {
  const auto paint = [&](const char* code, const std::string& text) {
    return colour ? std::string(code) + text + "\033[0m" : text;
  };
  std::string out;
  if (report.verdict == Verdict::within) {
    out +=
        paint("\033[1;32m", "WITHIN THE FLOOR") + "  " + report.reason + beyond_floor(report.scores) + "\n";
  } else if (report.verdict == Verdict::inconclusive) {
    out += paint("\033[1;33m", "CANNOT CONCLUDE") + "  " + report.reason + "\n";
  } else {
    out += paint("\033[1;31m", "DIVERGENT") + "  first error: " + phase(*report.first) + ", sequence " +
           std::to_string(report.first->row) + ", " + report.first->name();
    if (!report.first->heads.empty()) out += ", heads " + head_list(*report.first);
    out += ", position " + std::to_string(report.first->first_bad);
    if (report.skipped > 0) out += fmt::format(" ({} sites before it were not compared)", report.skipped);
    out += "\n";
    out += fmt::format("  error {:.3g} = {:.3g} x floor ({:.2g}); ", report.first->error, report.first->score,
                       report.first->floor);
    out += report.alone ? fmt::format("{} later sites err by themselves, too\n", *report.alone)
                        : fmt::format("inherited by {} later sites\n", report.inherited);
    for (const std::string& hint : report.hints) out += "  hint: " + hint + "\n";
  }
  for (const std::string& note : report.notes) out += "  " + note + "\n";
  out += fmt::format("  coverage {}/{} sites", report.compared, report.expected);
  out += report.unmatched.empty()
             ? "\n"
             : fmt::format(", {} unmatched: {}; the first: {}\n", report.unmatched.size(),
                           unmatched_sites(report.unmatched), report.unmatched[0].text());
  if (report.scores.empty()) return out;

  const std::vector<size_t> shown = rows_shown(report);
  out += fmt::format("\n  {:<18} {:<15} {:<4} {:<16} {:>10} {:>12}  {}\n", "site", "phase", "row",
                     "bad heads", "error", "error/floor", "verdict");
  for (const size_t index : shown) {
    const SiteScore& each = report.scores[index];
    const std::string line =
        fmt::format("  {:<18} {:<15} {:<4} {:<16} {:>10.2g} {:>12.3g}  {}", each.name(), phase(each),
                    each.row, head_list(each), each.error, each.score, band_name(each.score));
    out += each.score > kBand ? paint("\033[31m", line) : line;
    out += "\n";
  }
  if (const size_t hidden = report.scores.size() - shown.size(); hidden > 0)
    out += fmt::format("  {} more sites; --json lists all\n", hidden);
  return out;
}

std::string report_json(const DiffReport& report) {
  json scores = json::array(), unmatched = json::array();
  for (const SiteScore& each : report.scores) scores.push_back(as_json(each));
  for (const Unmatched& each : report.unmatched) unmatched.push_back(each.text());
  const json out = {
      {"schema", "lockstep-diff-1"},
      {"verdict", verdict_name(report.verdict)},
      {"reason", report.reason},
      {"subject", report.subject},
      {"reference", report.reference},
      {"first", report.first ? as_json(*report.first) : json()},
      {"hints", report.hints},
      {"inherited", report.inherited},
      {"alone", report.alone.value_or(0)},
      {"coverage", {{"compared", report.compared}, {"expected", report.expected}, {"unmatched", unmatched}}},
      {"notes", report.notes},
      {"band", kBand},
      {"sites", scores}};
  return out.dump(1, ' ', false, json::error_handler_t::replace);
}

std::string report_html(const DiffReport& report) {
  std::string out =
      "<!doctype html><meta charset=\"utf-8\"><title>lockstep diff</title><style>body{font:14px "
      "system-ui,sans-serif;margin:2em}"
      "table{border-collapse:collapse;margin:1em 0}td,th{padding:2px "
      "6px;font-size:12px;text-align:right}td.h{min-width:14px}"
      "td.first{outline:2px solid #000}"
      "pre{background:#f4f4f4;padding:1em;overflow:auto}</style>\n<h1>lockstep diff</h1>\n<pre>" +
      escaped(report_text(report, false)) + "</pre>\n";
  // Layers by sites, the worst score over steps and sequences.
  std::vector<std::string> sites;
  std::map<std::pair<int, std::string>, double> worst;
  for (const SiteScore& each : report.scores) {
    if (std::ranges::find(sites, each.site) == sites.end()) sites.push_back(each.site);
    double& cell = worst[{each.layer, each.site}];
    cell = std::max(cell, each.score);
  }
  std::vector<int> layers;
  for (const auto& [key, score] : worst) {
    if (std::ranges::find(layers, key.first) == layers.end()) layers.push_back(key.first);
  }
  out += "<h2>error / floor, layer by site</h2>\n<table><tr><th></th>";
  for (const std::string& site : sites) out += "<th>" + escaped(site) + "</th>";
  out += "</tr>\n";
  for (const int layer : layers) {
    out += "<tr><th>" + (layer == kNoLayer ? std::string("-") : std::to_string(layer)) + "</th>";
    for (const std::string& site : sites) {
      const auto cell = worst.find({layer, site});
      out += cell == worst.end() ? "<td></td>"
                                 : fmt::format("<td style=\"background:{}\">{:.2g}</td>",
                                               heat_colour(cell->second), cell->second);
    }
    out += "</tr>\n";
  }
  out += "</table>\n";
  if (report.first) {
    const bool heads = !report.first->heads.empty();
    out += "<h2>" + escaped(report.first->name()) + ", " + phase(*report.first) + ", error / floor" +
           (heads ? ", head by token" : " by token") + "</h2>\n<table><tr><th>position</th>";
    for (size_t h = 0; h < report.first->heads.size(); ++h) out += "<th>" + std::to_string(h) + "</th>";
    out += "</tr>\n";
    bool marked = false;
    for (size_t t = 0; t < report.grid.positions.size(); ++t) {
      out += "<tr><th>" + std::to_string(report.grid.positions[t]) + "</th>";
      for (const double score : report.grid.scores[t]) {
        const bool first_bad = !marked && score > kBand;
        marked = marked || first_bad;
        out += fmt::format("<td class=\"{}\" style=\"background:{}\">{:.2g}</td>",
                           first_bad ? "h first" : "h", heat_colour(score), score);
      }
      out += "</tr>\n";
    }
    out += "</table>\n";
  }
  return out;
}

void save_text(const std::filesystem::path& file, const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  write_file(file, {&bytes, 1});
}

}  // namespace lockstep

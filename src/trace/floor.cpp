// The noise floor: how far correct computations are apart.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "format/json.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"

namespace lockstep {

using nlohmann::json;

namespace {

constexpr double kMostFloor = 10;  // correct computations that are farther apart say nothing

}  // namespace

Floor::Floor(const std::filesystem::path& file, const std::string& policy) : policy_(policy) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) fail(ErrorCode::not_found, "[{}] floor: expected a readable file, got none", file.string());
  const json data = parse_json(std::string{std::istreambuf_iterator<char>(stream), {}}, file.string());
  try {
    if (data.at("format") != "lockstep-floor" || data.at("version") != 1)
      throw json::other_error::create(500, "version", nullptr);
    for (const auto& [name, table] : data.at("policies").items()) {
      for (const char* phase : {"prefill", "decode"}) {
        for (const auto& [site, floor] : table.at(phase).items()) {
          if (const double value = floor.get<double>(); value < 0 || value > kMostFloor)
            fail(ErrorCode::format, "[{}] floor: expected relative errors from 0 to {}, got {} for {}",
                 file.string(), kMostFloor, value, site);
        }
      }
      tables_[name] = {table.at("prefill").get<std::map<std::string, double>>(),
                       table.at("decode").get<std::map<std::string, double>>()};
    }
  } catch (const json::exception&) {
    fail(ErrorCode::format, "[{}] floor: expected a floor of version 1, got another", file.string());
  }
  if (!tables_.contains(policy)) {
    std::string known;
    for (const auto& [name, table] : tables_) known += (known.empty() ? "" : ", ") + name;
    fail(ErrorCode::invalid_argument, "[{}] policy: expected one that was measured ({}), got {}",
         file.string(), known, policy);
  }
}

Floor::Floor(const std::string& name, double value) : policy_("bundle") {
  tables_[policy_] = {{{name, value}}, {{name, value}}};
}

double Floor::at(bool decode, const std::string& name, int64_t width) const {
  const double least = 0x1p-23 * std::sqrt(static_cast<double>(width));
  const auto policy = tables_.find(policy_);
  if (policy == tables_.end()) return least;
  const auto& table = decode ? policy->second.decode : policy->second.prefill;
  const auto known = table.find(name);
  return std::max(least, known == table.end() ? 0.0 : known->second);
}

std::vector<Floor> Floor::others() const {
  std::vector<Floor> all;
  for (const auto& [name, table] : tables_) {
    if (name == policy_) continue;
    all.push_back(*this);
    all.back().policy_ = name;
  }
  return all;
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

}  // namespace lockstep

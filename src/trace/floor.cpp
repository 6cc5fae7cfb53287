// The noise floor: how far correct computations are apart.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "format/json.h"
#include "format/presence.h"
#include "lockstep/divergence.h"
#include "tensor/fail.h"
#include "trace/compare.h"

namespace lockstep {

using nlohmann::json;

namespace {

constexpr double kMostError = 10;  // correct computations that are farther apart say nothing

}  // namespace

Floor::Floor(const std::filesystem::path& file, const std::string& policy) : policy_(policy) {
  std::ifstream stream;
  if (is_file(file)) stream.open(file, std::ios::binary);
  if (!stream.is_open())
    fail(ErrorCode::not_found, "[{}] floor: expected a readable file, got none", file.string());
  const json data = parse_json(std::string{std::istreambuf_iterator<char>(stream), {}}, file.string());
  try {
    if (data.at("format") != "lockstep-floor" || data.at("version") != 1)
      throw json::other_error::create(500, "version", nullptr);
    for (const auto& [name, table] : data.at("policies").items()) {
      for (const char* phase : {"prefill", "decode"}) {
        for (const auto& [site, floor] : table.at(phase).items()) {
          if (const double value = floor.get<double>(); value < 0 || value > kMostError)
            fail(ErrorCode::format, "[{}] floor: expected relative errors from 0 to {}, got {} for {}",
                 file.string(), kMostError, value, site);
        }
      }
      tables_[name] = {table.at("prefill").get<std::map<std::string, double>>(),
                       table.at("decode").get<std::map<std::string, double>>()};
    }
    if (const auto model = data.find("model"); model != data.end()) {
      architecture_ = model->at("architecture").get<std::string>();
      layers_ = model->at("layers").get<int64_t>();
      if (!model->at("layers").is_number_integer() || layers_ < 0)
        throw json::other_error::create(500, "layers", nullptr);
      weights_sha256_ = model->at("weights_sha256").get<std::map<std::string, std::string>>();
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
  // Without a measurement: what whole networks were seen to add to the rounding of one sum, and more.
  if (policy == tables_.end()) return 16 * least;
  const auto& table = decode ? policy->second.decode : policy->second.prefill;
  const auto known = table.find(name);
  return std::max(least, known == table.end() ? 0.0 : known->second);
}

bool Floor::knows(bool decode, const std::string& name) const {
  const auto policy = tables_.find(policy_);
  if (policy == tables_.end()) return true;
  return (decode ? policy->second.decode : policy->second.prefill).contains(name);
}

std::string Floor::other_model(const Trace& trace) const {
  Trace measured;
  measured.architecture = architecture_;
  measured.layers = layers_;
  std::string problem = same_model(measured, trace);
  if (problem.empty()) problem = same_weights(weights_sha256_, trace);
  return problem.empty() ? "" : "the floor was measured on another model: " + problem;
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

namespace {

// By phase and site, the largest error of a variant.
using Errors = std::map<std::pair<bool, std::string>, double>;

Errors errors_of(const Trace& variant, const std::map<Place, Joined>& expected) {
  Errors errors;
  for (const auto& [place, joined] : join(variant)) {
    const auto reference = expected.find(place);
    if (reference == expected.end()) continue;
    const Sizes usual = usual_sizes(reference->second, 0);
    double& worst = errors[{joined.event->step > 0, joined.event->name()}];
    for (const auto& [position, row] : reference->second.rows) {
      const auto mine = joined.rows.find(position);
      if (mine != joined.rows.end() && mine->second.size() == row.size())
        worst = std::max(worst, relative(mine->second, row, usual.row));
    }
  }
  return errors;
}

// A variant that alone is far from the truth is no correct computation, or one of another policy.
std::string standing_alone(const std::vector<Errors>& all, std::span<const Trace> variants) {
  for (size_t v = 0; v < all.size() && all.size() > 1; ++v) {
    for (const auto& [site, error] : all[v]) {
      double others = 0x1p-23;
      for (size_t o = 0; o < all.size(); ++o) {
        const auto other = all[o].find(site);
        if (o != v && other != all[o].end()) others = std::max(others, other->second);
      }
      if (error > 4 * kBand * others)
        return fmt::format("{} stands alone at {}: an error of {:.2g}, where the other variants have {:.2g}",
                           variants[v].where, site.second, error, others);
    }
  }
  return {};
}

}  // namespace

std::string measure_floor(const Trace& truth, std::span<const Trace> variants, const std::string& policy) {
  std::map<std::string, double> prefill, decode;
  const auto expected = join(truth);
  std::vector<Errors> all;
  json warnings = json::array();
  for (const Trace& variant : variants) {
    if (const std::string problem = same_inputs(variant, truth); !problem.empty()) {
      fail(ErrorCode::invalid_argument, "[{}] floor: {}", variant.where, problem);
    }
    all.push_back(errors_of(variant, expected));
    for (const auto& [site, error] : all.back()) {
      double& worst = (site.first ? decode : prefill)[site.second];
      worst = std::max(worst, error);
      if (error > kCoarsestFloor)
        warnings.push_back(fmt::format("{}: an error of {:.2g} at {}, too large to judge by", variant.where,
                                       error, site.second));
    }
  }
  if (std::string alone = standing_alone(all, variants); !alone.empty()) warnings.push_back(std::move(alone));
  return json{{"format", "lockstep-floor"},
              {"version", 1},
              {"model",
               {{"architecture", truth.architecture},
                {"layers", truth.layers},
                {"weights_sha256", truth.weights_sha256}}},
              {"warnings", warnings},
              {"policies", {{policy, {{"prefill", prefill}, {"decode", decode}}}}}}
      .dump(1);
}

}  // namespace lockstep

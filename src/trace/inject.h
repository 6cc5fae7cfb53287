// How a fault does its damage: hooks around the recording of a site.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"
#include "models/sizes.h"

namespace lockstep {

/// What the faults need to know of a model.
struct ModelFacts : TransformerSizes {
  const Checkpoint* checkpoint = nullptr;
  nlohmann::json config;
  int64_t window = 0;  // of the layers that have one
  std::string rope_type = "default";

  /// Errors `unsupported` and `format` as of loading the model.
  explicit ModelFacts(const Checkpoint& checkpoint);
};

/// Of each weight file by its name.
std::map<std::string, std::string> weight_sums(const Checkpoint& checkpoint);

/// The rows of the pass that is running.
struct PassRows {
  int step = 0;
  int chunk = 0;                   // of the prefill
  std::vector<int32_t> positions;  // [T]
  std::vector<int> sequences;      // [T]
};

/// Damages tensors. What is done `before` a site is recorded shows there; what is done `after` shows only in
/// what is computed from it: so a fault inside an operation damages its inputs after and repairs its outputs
/// before.
struct Injection {
  using Hook = std::function<void(const ModelFacts&, const PassRows&, int layer, Site, Tensor&,
                                  std::map<Site, Tensor>& seen)>;

  Fault fault;
  /// Why it cannot act here; nothing: it can.
  std::function<std::optional<std::string>(const ModelFacts&, const std::vector<Trace::Sequence>&)> cannot;
  std::function<nlohmann::json(const ModelFacts&)> patch = {};  // of the config; empty: none
  Hook before = {}, after = {};
  std::vector<Site> keeps = {};        // sites whose tensors `before` wants to see later in the layer
  std::optional<Site> inner = {};      // the inner site it changes
  int least_head = 0, most_head = -1;  // those it is confined to; -1: all
  int most_layer = 0;

  /// Does its damage to a site that `look` looks at in between.
  template <typename Look>
  void around(const ModelFacts& facts, const PassRows& rows, int layer, Site site, Tensor& tensor,
              std::map<Site, Tensor>& seen, const Look& look) const {
    if (before) before(facts, rows, layer, site, tensor, seen);
    look();
    if (std::ranges::find(keeps, site) != keeps.end()) seen.insert_or_assign(site, tensor.clone());
    if (after) after(facts, rows, layer, site, tensor, seen);
  }
};
const std::vector<Injection>& injections();
/// "NAME" or "NAME@layer=3". Error `invalid_argument` naming those there are.
Injection find_injection(const std::string& text);
/// The same for one model. Error `invalid_argument` for a layer or head it does not have.
Injection find_injection(const std::string& text, const ModelFacts& facts);

}  // namespace lockstep

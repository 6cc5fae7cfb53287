// The catalogue of faults: docs/faults.md.
#include <algorithm>
#include <charconv>
#include <string_view>

#include "models/architecture.h"
#include "tensor/fail.h"
#include "trace/fault_tools.h"

namespace lockstep {

using nlohmann::json;

ModelFacts::ModelFacts(const Checkpoint& from)
    : TransformerSizes(architecture_of(from).sizes(from.config())),
      checkpoint(&from),
      config(json::parse(from.config().json())),
      window(std::ranges::max(windows)) {
  const Config& c = from.config();
  const Config* rope =
      c.object("rope_parameters") != nullptr ? c.object("rope_parameters") : c.object("rope_scaling");
  if (rope != nullptr) rope_type = rope->text("rope_type", rope->text("type", "default"));
}

const std::vector<Injection>& injections() {
  static const std::vector<Injection> all = [] {
    std::vector<Injection> list = rope_faults();
    for (auto make : {attention_faults, layer_faults, weight_faults}) {
      for (Injection& each : make()) list.push_back(std::move(each));
    }
    return list;
  }();
  return all;
}

namespace {

// Where "layer=N", "head=A" or "head=A-B" confine a fault.
struct Confines {
  std::optional<int> layer, first_head, last_head;
};

std::optional<Confines> parse_confines(std::string_view text) {
  Confines result;
  const auto number = [&](std::string_view part, std::optional<int>& to) {
    const std::string digits(part);
    int value = 0;
    const char* end = digits.c_str() + digits.size();
    if (digits.empty() || std::from_chars(digits.c_str(), end, value).ptr != end || value < 0) return false;
    to = value;
    return true;
  };
  while (true) {
    const std::string_view part = text.substr(0, text.find(','));
    if (part.starts_with("layer=")) {
      if (!number(part.substr(6), result.layer)) return {};
    } else if (part.starts_with("head=")) {
      const std::string_view range = part.substr(5);
      const size_t dash = range.find('-');
      if (!number(range.substr(0, dash), result.first_head)) return {};
      result.last_head = result.first_head;
      if (dash != std::string_view::npos && !number(range.substr(dash + 1), result.last_head)) return {};
      if (*result.last_head < *result.first_head) return {};
    } else {
      return {};
    }
    if (part.size() == text.size()) return result;
    text.remove_prefix(part.size() + 1);
  }
}

// The hook in one layer only, leaving the other heads as they were.
Injection::Hook confined(const Confines& to, const Injection::Hook& hook) {
  if (!hook) return {};
  return [=](const ModelFacts& facts, const PassRows& rows, int layer, Site site, Tensor& x, Seen& seen) {
    if (to.layer && layer != *to.layer) return;
    if (!to.first_head) return hook(facts, rows, layer, site, x, seen);
    const Tensor whole = x.clone();
    hook(facts, rows, layer, site, x, seen);
    if (x.shape().rank() != 3) return;
    const int64_t width = x.shape()[2];
    for (int64_t t = 0; t < x.shape()[0]; ++t) {
      for (int64_t h = 0; h < x.shape()[1]; ++h) {
        if (h < *to.first_head || h > *to.last_head)
          std::copy_n(whole.row(t) + h * width, width, x.row(t) + h * width);
      }
    }
  };
}

}  // namespace

Injection find_injection(const std::string& text) {
  const size_t at = text.find('@');
  const std::string name = text.substr(0, at);
  std::string names;
  for (const Injection& each : injections()) {
    names += (names.empty() ? "" : ", ") + each.fault.name;
    if (each.fault.name != name) continue;
    if (at == std::string::npos) return each;
    const auto to = parse_confines(std::string_view(text).substr(at + 1));
    const bool outside = each.fault.site == "embed" || each.fault.site == "logits";
    if (!to || each.patch || (to->first_head && each.fault.heads.empty()) || (to->layer && outside)) {
      fail(ErrorCode::invalid_argument,
           "[inject] place: expected NAME@layer=N,head=A-B (either may be left out) of a fault that is no "
           "change of the config, layer= of one within layers, head= of one that has heads; got {}",
           text);
    }
    Injection narrowed = each;
    narrowed.before = confined(*to, each.before);
    narrowed.after = confined(*to, each.after);
    narrowed.least_head = to->first_head.value_or(0);
    narrowed.most_layer = to->layer.value_or(0);
    narrowed.most_head = to->last_head.value_or(-1);
    return narrowed;
  }
  fail(ErrorCode::invalid_argument, "[inject] fault: expected one of {}; got {}", names, name);
}

namespace {

// Whether a fault that leaves some heads as they are changes this one.
bool touches(const Fault& fault, int head, const ModelFacts& facts) {
  if (fault.heads == "1-") return head > 0;
  if (fault.name != "gqa-tiled" || facts.kv_heads == 0) return true;
  return head % facts.kv_heads != head / (facts.heads / facts.kv_heads);
}

}  // namespace

Injection find_injection(const std::string& text, const ModelFacts& facts) {
  Injection found = find_injection(text);
  const int64_t heads = found.fault.site.starts_with("k_") ? facts.kv_heads : facts.heads;
  if (found.most_layer >= facts.layers || found.most_head >= heads) {
    fail(ErrorCode::invalid_argument, "[inject] place: expected layers 0 to {} and heads 0 to {}, got {}",
         facts.layers - 1, heads - 1, text);
  }
  bool touched = found.most_head < 0;
  for (int head = found.least_head; head <= found.most_head; ++head)
    touched = touched || touches(found.fault, head, facts);
  if (!touched)
    fail(ErrorCode::invalid_argument, "[inject] place: expected heads that the fault changes, got {}", text);
  return found;
}

const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = [] {
    std::vector<Fault> list;
    for (const Injection& each : injections()) list.push_back(each.fault);
    return list;
  }();
  return all;
}

Fault find_fault(const std::string& name) { return find_injection(name).fault; }

}  // namespace lockstep

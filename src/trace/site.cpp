#include <algorithm>
#include <array>

#include "lockstep/trace.h"

namespace lockstep {
namespace {

// In the order of Site.
constexpr std::array<std::string_view, 33> kNames = {"embed",         "attn_norm",
                                                     "q_proj",        "k_proj",
                                                     "v_proj",        "q_norm",
                                                     "k_norm",        "q_rope",
                                                     "k_rope",        "k_cache",
                                                     "v_cache",       "scores",
                                                     "probs",         "attn_ctx",
                                                     "o_proj",        "attn_post_norm",
                                                     "attn_resid",    "ffn_norm",
                                                     "router_logits", "router_weights",
                                                     "expert_gate",   "expert_up",
                                                     "expert_act",    "expert_down",
                                                     "gate",          "up",
                                                     "act",           "down",
                                                     "moe_out",       "ffn_post_norm",
                                                     "ffn_resid",     "final_norm",
                                                     "logits"};

}  // namespace

std::string_view site_name(Site site) { return kNames[static_cast<size_t>(site)]; }

std::optional<Site> find_site(std::string_view name) {
  const auto found = std::ranges::find(kNames, name);
  if (found == kNames.end()) return {};
  return static_cast<Site>(found - kNames.begin());
}

}  // namespace lockstep

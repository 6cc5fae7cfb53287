#include "lockstep/trace.h"

namespace lockstep {

std::string_view site_name(Site site) {
  // In the order of Site.
  static constexpr std::string_view kNames[] = {
      "embed",    "attn_norm", "q_proj",     "k_proj",   "v_proj",        "q_rope",         "k_rope",
      "attn_ctx", "o_proj",    "attn_resid", "ffn_norm", "router_logits", "router_weights", "gate",
      "up",       "act",       "down",       "moe_out",  "ffn_resid",     "final_norm",     "logits"};
  return kNames[static_cast<int>(site)];
}

}  // namespace lockstep

// Sites: the named places of a forward pass whose tensors can be observed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "lockstep/tensor.h"

namespace lockstep {

/// Every site, in causal order within a layer. Shapes: T rows, H query heads, Hkv KV heads, D head
/// dimension, E experts, K keys (the j-th is the one of position j). Inner sites lie within a fused span and
/// are computed only where an observer asks.
enum class Site : uint8_t {
  embed,           ///< [T, hidden], no layer
  attn_norm,       ///< [T, hidden]
  q_proj,          ///< [T, H, D], bias included
  k_proj,          ///< [T, Hkv, D]
  v_proj,          ///< [T, Hkv, D]
  q_norm,          ///< [T, H, D]
  k_norm,          ///< [T, Hkv, D]
  q_rope,          ///< [T, H, D]
  k_rope,          ///< [T, Hkv, D]
  k_cache,         ///< inner, [T, Hkv, D]: keys of these rows as attention reads them back
  v_cache,         ///< inner, [T, Hkv, D]
  scores,          ///< inner, [T, H, K]: scaled; 0 where masked
  probs,           ///< inner, [T, H, K]
  attn_ctx,        ///< [T, H, D]
  o_proj,          ///< [T, hidden]
  attn_post_norm,  ///< [T, hidden]
  attn_resid,      ///< [T, hidden]
  ffn_norm,        ///< [T, hidden]
  router_logits,   ///< [T, E]
  router_weights,  ///< [T, E]: weight of each chosen expert, 0 for the others
  expert_gate,     ///< inner, [T, E, intermediate]: 0 for experts not chosen, as in the next three
  expert_up,       ///< inner, [T, E, intermediate]
  expert_act,      ///< inner, [T, E, intermediate]
  expert_down,     ///< inner, [T, E, hidden]: before the weight of the router
  gate,            ///< [T, intermediate]
  up,              ///< [T, intermediate]
  act,             ///< [T, intermediate]: silu(gate) * up
  down,            ///< [T, hidden]
  moe_out,         ///< [T, hidden]
  ffn_post_norm,   ///< [T, hidden]
  ffn_resid,       ///< [T, hidden]
  final_norm,      ///< [rows asked for, hidden], no layer
  logits,          ///< [rows asked for, vocab], no layer
};

/// "q_rope"
std::string_view site_name(Site site);
/// Nothing for a name that is none of ours.
std::optional<Site> find_site(std::string_view name);

/// Layer of the sites that belong to none.
inline constexpr int kNoLayer = -1;

/// What an observer does with a tensor that is only computed for those who ask.
enum class Interest : uint8_t { none, read, change };

/// Looks at, replaces or damages the tensors of a forward pass, in the order they are computed.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void observe(int layer, Site site, Tensor& tensor) = 0;
  /// What it does with an inner site. `change`: the span is computed in its plain form, from what it leaves.
  virtual Interest inner(Site) const { return Interest::none; }
};

/// What a forward pass hands its tensors to. Without an observer a tap is one predictable branch.
class Taps {
 public:
  Taps() = default;
  explicit Taps(Observer* observer) : observer_(observer) {}

  Tensor operator()(int layer, Site site, Tensor&& tensor) {
    if (observer_ != nullptr) observer_->observe(layer, site, tensor);
    return std::move(tensor);
  }
  void operator()(int layer, Site site, Tensor& tensor) {
    if (observer_ != nullptr) observer_->observe(layer, site, tensor);
  }
  bool observed() const { return observer_ != nullptr; }
  Interest inner(Site site) const { return observer_ == nullptr ? Interest::none : observer_->inner(site); }

 private:
  Observer* observer_ = nullptr;
};

}  // namespace lockstep

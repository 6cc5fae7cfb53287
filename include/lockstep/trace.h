// Sites: the named places of a forward pass whose tensors can be observed.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "lockstep/tensor.h"

namespace lockstep {

/// Every site, in causal order within a layer. Shapes: T rows, H query heads, Hkv KV heads, D head
/// dimension, E experts, k experts per token.
enum class Site : uint8_t {
  embed,           ///< [T, hidden], no layer
  attn_norm,       ///< [T, hidden]
  q_proj,          ///< [T, H, D], bias included
  k_proj,          ///< [T, Hkv, D]
  v_proj,          ///< [T, Hkv, D]
  q_rope,          ///< [T, H, D]
  k_rope,          ///< [T, Hkv, D]
  attn_ctx,        ///< [T, H, D]
  o_proj,          ///< [T, hidden]
  attn_resid,      ///< [T, hidden]
  ffn_norm,        ///< [T, hidden]
  router_logits,   ///< [T, E]
  router_weights,  ///< [T, E]: weight of each chosen expert, 0 for the others
  gate,            ///< [T, intermediate]
  up,              ///< [T, intermediate]
  act,             ///< [T, intermediate]: silu(gate) * up
  down,            ///< [T, hidden]
  moe_out,         ///< [T, hidden]
  ffn_resid,       ///< [T, hidden]
  final_norm,      ///< [rows asked for, hidden], no layer
  logits,          ///< [rows asked for, vocab], no layer
};

/// "q_rope"
std::string_view site_name(Site site);

/// Layer of the sites that belong to none.
inline constexpr int kNoLayer = -1;

/// Looks at, replaces or damages the tensors of a forward pass, in the order they are computed.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void observe(int layer, Site site, Tensor& tensor) = 0;
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
  bool active() const { return observer_ != nullptr; }

 private:
  Observer* observer_ = nullptr;
};

}  // namespace lockstep

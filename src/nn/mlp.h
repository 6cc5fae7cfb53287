// Feed-forward networks: SwiGLU (Shazeer 2020) and the sparse mixture of experts of Mixtral
// (Jiang et al. 2024; transformers' MixtralSparseMoeBlock).
#pragma once

#include "lockstep/tensor.h"
#include "lockstep/trace.h"
#include "nn/linear.h"

namespace lockstep::nn {

/// silu(gate) * up, element by element, in gate's memory. gate, up: [T, intermediate].
Tensor swiglu(Tensor gate, const Tensor& up, const Runtime& runtime);

/// down(silu(gate(x)) * up(x)). x: [T, hidden] -> [T, hidden].
Tensor mlp(const Tensor& x, const Linear& gate, const Linear& up, const Linear& down, int layer, Taps& tap);

/// Weight of each expert: softmax over all logits, the `experts_per_token` largest kept (ties: the lower
/// expert) and divided by their sum, 0 for the others. logits: [T, E] -> [T, E].
Tensor route(const Tensor& logits, int64_t experts_per_token);

/// Each row's experts as `route` chooses them, weighted and added up in ascending order.
/// x: [T, hidden] -> [T, hidden]; router: [E, hidden]. Inner sites: expert_gate, expert_up, expert_act,
/// expert_down.
Tensor sparse_moe(const Tensor& x, const Linear& router, const SwitchGLU& experts, int64_t experts_per_token,
                  int layer, Taps& tap);

}  // namespace lockstep::nn

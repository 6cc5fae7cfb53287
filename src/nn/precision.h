// How products round their inputs: by precision, by what the product is for, by the weight's format.
#pragma once

#include <cstdint>

#include "nn/runtime.h"
#include "quant/blocks.h"
#include "quant/pack.h"

namespace lockstep::nn {

/// What a product is for. moe_q, moe_o and moe_down: of a layer whose feed-forward is a mixture of experts.
enum class Role : uint8_t { q, k, v, o, moe_q, moe_o, gate, up, down, moe_down, router, head };

/// The form in which a product takes its inputs.
enum class InputForm : uint8_t {
  f32,
  fixed16,  ///< 16-bit fixed point per 32 columns
  fixed8,   ///< 8-bit fixed point per 16 columns
  bf16,
};

/// The policy of `fast` for weights of integers: 8 bits where that does little harm. Keys and values are kept
/// for the whole context; a router decides, and so do the attention before it and the experts' down of the
/// layer before, whose errors change what it chooses (more than half of all error in a mixture); the head is
/// the last word: these take 16. Experts' down in 16 bits halves a Mixtral's error for a tenth of its speed
/// in prefill; in a dense SmolLM2 down would take off a quarter of the error, still more than that of exact,
/// for a fifth of the speed (bench/accuracy). Where the processor gains nothing by 8 bits
/// (`Table::narrow_bits`) they are not taken.
constexpr bool takes_8_bits(Role role) {
  return role == Role::q || role == Role::o || role == Role::gate || role == Role::up || role == Role::down;
}

/// bf16 weights take bf16 in `fast`, the router's excepted, where the kernels in use have products of them.
inline InputForm input_form(const Runtime& runtime, const quant::PanelMatrix& weight, Role role) {
  if (runtime.precision == Precision::f32) return InputForm::f32;
  const bool fast = runtime.precision == Precision::fast;
  if (const int bits = quant::code_format(weight.dtype).bits; bits > 0) {
    const bool narrow = fast && takes_8_bits(role) && bits <= runtime.kernels->narrow_bits;
    return narrow ? InputForm::fixed8 : InputForm::fixed16;
  }
  const bool pairs =
      fast && weight.dtype == DType::bf16 && role != Role::router && runtime.kernels->linear_bf16 != nullptr;
  return pairs ? InputForm::bf16 : InputForm::f32;
}

}  // namespace lockstep::nn

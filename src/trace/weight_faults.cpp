// Faults in reading quantised weights: the stored bytes are damaged in a copy, and the product done again.
#include <algorithm>
#include <cstring>

#include "quant/blocks.h"
#include "tensor/fail.h"
#include "trace/fault_tools.h"

namespace lockstep {
namespace {

using Bytes = std::vector<std::byte>;

// A stored matrix with bytes of its own.
struct Damaged {
  explicit Damaged(const StoredTensor& stored)
      : tensor(stored),
        data(stored.data.begin(), stored.data.end()),
        scales(stored.scales.begin(), stored.scales.end()),
        biases(stored.biases.begin(), stored.biases.end()) {
    tensor.data = data;
    tensor.scales = scales;
    tensor.biases = biases;
  }
  StoredTensor tensor;
  Bytes data, scales, biases;
};

const StoredTensor* query_weight(const ModelFacts& facts, int layer) {
  return facts.checkpoint->find("model.layers." + std::to_string(layer) + ".self_attn.q_proj.weight");
}

// Bytes of a block of 32 codes and of the scale (and minimum) before them; 0: another format.
struct BlockBytes {
  size_t block = 0, head = 0;
};
BlockBytes nibble_block(DType dtype) {
  if (dtype == DType::q4_0) return {18, 2};
  if (dtype == DType::q4_1) return {20, 4};
  return {};
}
BlockBytes scaled_block(DType dtype) {
  return dtype == DType::q8_0 ? BlockBytes{34, 2} : nibble_block(dtype);
}

void swap_nibbles(Damaged& weight) {
  const auto [block, head] = nibble_block(weight.tensor.dtype);
  for (size_t i = 0; i < weight.data.size(); ++i) {
    const auto byte = static_cast<unsigned>(weight.data[i]);
    if (i % block >= head) weight.data[i] = static_cast<std::byte>((byte >> 4 | byte << 4) & 255);
  }
}
void shift_scales(Damaged& weight) {
  const auto [block, head] = scaled_block(weight.tensor.dtype);
  for (size_t i = 0; i + block < weight.data.size(); i += block)
    std::memcpy(&weight.data[i], &weight.data[i + block], head);
}
void drop_biases(Damaged& weight) { std::ranges::fill(weight.biases, std::byte{0}); }
void double_groups(Damaged& weight) {
  const StoredTensor& stored = weight.tensor;
  const size_t size =
      weight.scales.size() / static_cast<size_t>(stored.rows() * (stored.columns() / stored.group_size));
  for (Bytes* each : {&weight.scales, &weight.biases}) {
    for (size_t i = size; i < each->size(); i += 2 * size) std::memcpy(&(*each)[i], &(*each)[i - size], size);
  }
}

// Q computed with the damaged weight from the input that was seen. x: [T, H, D].
template <typename Damage>
Injection damaged_query(Fault fault, bool (*fits)(const StoredTensor&), const char* why_not, Damage damage) {
  const auto fitting = [=](const ModelFacts& facts, int layer) {
    const StoredTensor* weight = query_weight(facts, layer);
    return weight != nullptr && fits(*weight) ? weight : nullptr;
  };
  return {.fault = std::move(fault),
          .cannot = [=](const ModelFacts& facts,
                        const Sequences&) { return fitting(facts, 0) != nullptr ? Why() : Why(why_not); },
          .before = at(Site::q_proj,
                       [=](const ModelFacts& facts, const PassRows&, int layer, Tensor& x, Seen& seen) {
                         const StoredTensor* weight = fitting(facts, layer);
                         if (weight == nullptr) return;
                         Damaged wrong(*weight);
                         damage(wrong);
                         const Tensor& input = seen.at(Site::attn_norm);  // [T, hidden]
                         const int64_t columns = weight->columns();
                         std::vector<float> right_row(static_cast<size_t>(columns)),
                             wrong_row(right_row.size());
                         for (int64_t r = 0; r < weight->rows(); ++r) {
                           quant::dequantise_row(*weight, weight->stored_row(r), right_row.data());
                           quant::dequantise_row(wrong.tensor, weight->stored_row(r), wrong_row.data());
                           for (int64_t t = 0; t < input.shape()[0]; ++t) {
                             double sum = 0;
                             for (int64_t d = 0; d < columns; ++d) {
                               const auto at = static_cast<size_t>(d);
                               sum += static_cast<double>(input.row(t)[d]) *
                                      (static_cast<double>(wrong_row[at]) - right_row[at]);
                             }
                             x.row(t)[r] += static_cast<float>(sum);
                           }
                         }
                       }),
          .keeps = {Site::attn_norm}};
}

}  // namespace

std::vector<Injection> weight_faults() {
  std::vector<Injection> all;
  all.push_back(damaged_query(
      fault("nibbles-swapped", 17, "takes the high four bits of a byte for the low ones", "q_proj", "all"),
      [](const StoredTensor& w) { return nibble_block(w.dtype).block > 0; }, "Q is not in Q4_0 or Q4_1",
      swap_nibbles));
  all.push_back(damaged_query(
      fault("scale-of-next-block", 17, "gives each block the scale of the one after it", "q_proj", "all"),
      [](const StoredTensor& w) { return scaled_block(w.dtype).block > 0; }, "Q is not in Q4_0, Q4_1 or Q8_0",
      shift_scales));
  all.push_back(damaged_query(
      fault("mlx-biases-dropped", 17, "leaves out the biases of the groups", "q_proj", "all"),
      [](const StoredTensor& w) { return !w.biases.empty(); }, "Q has no groups with biases", drop_biases));
  all.push_back(damaged_query(
      fault("mlx-group-doubled", 18, "reads the scales of every other group, as for twice the group size",
            "q_proj", "all"),
      [](const StoredTensor& w) { return w.group_size > 0 && w.columns() >= 2 * w.group_size; },
      "Q has no two groups in a row", double_groups));
  return all;
}

}  // namespace lockstep

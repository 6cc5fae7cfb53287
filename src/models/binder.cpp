#include "models/binder.h"

#include <algorithm>

#include "quant/blocks.h"
#include "tensor/fail.h"

namespace lockstep {

const StoredTensor& Binder::take(const std::string& name, const Shape& shape, double share) {
  const StoredTensor* tensor = checkpoint_.find(name);
  if (tensor == nullptr) {
    fail(ErrorCode::format, "[{}] {}: expected a tensor of shape {}, got none of that name",
         checkpoint_.path().string(), name, shape.str());
  }
  if (tensor->shape != shape) {
    fail(ErrorCode::format, "[{}] shape: expected {}, got {}", tensor->source, shape.str(),
         tensor->shape.str());
  }
  if (taken_.insert(name).second) {
    account_.parameters += shape.size();
    account_.stored_bytes += tensor->stored_bytes();
    account_.row_bytes += share * static_cast<double>(tensor->stored_bytes());
  }
  return *tensor;
}

std::shared_ptr<const quant::PackedWeight> Binder::pack(std::span<const StoredTensor> experts) {
  auto weight = std::make_shared<quant::PackedWeight>(experts, memory_, source_);
  packer_.add(weight);
  return weight;
}

void Binder::count_product(DType dtype, double weights) {
  *multiplied_ += weights;
  if (quant::code_format(dtype).bits > 0) account_.integer_weights += weights;
}

nn::Linear Binder::linear(const std::string& name, nn::Role role, int64_t out, int64_t in, bool bias) {
  nn::Linear layer;
  layer.runtime = &runtime_;
  layer.role = role;
  const StoredTensor& weight = take(name + ".weight", {out, in});
  layer.weight = pack({&weight, 1});
  count_product(weight.dtype, static_cast<double>(out * in));
  if (bias) layer.bias = vector(name + ".bias", out);
  return layer;
}

nn::Linear Binder::embedding(const std::string& name, int64_t vocab, int64_t hidden) {
  const double one_row = 1.0 / static_cast<double>(vocab);
  return {&runtime_, nn::Role::head, pack({&take(name + ".weight", {vocab, hidden}, one_row), 1}), {}};
}

std::vector<float> Binder::vector(const std::string& name, int64_t n) {
  const StoredTensor& tensor = take(name, {n});
  std::vector<float> stored(static_cast<size_t>(n));
  quant::dequantise_row(tensor, 0, stored.data());
  if (tensor.interleaved_heads == 0) return stored;
  std::vector<float> values(stored.size());
  for (int64_t i = 0; i < n; ++i) values[i] = stored[tensor.stored_row(i)];
  return values;
}

std::shared_ptr<const quant::PackedWeight> Binder::experts(const std::string& stacked,
                                                           const std::function<std::string(int64_t)>& each,
                                                           int64_t count, int64_t out, int64_t in) {
  std::vector<StoredTensor> tensors;
  if (has(stacked + ".weight")) {
    const StoredTensor& all = take(stacked + ".weight", {count, out, in}, expert_share_);
    for (int64_t e = 0; e < count; ++e) tensors.push_back(all.slice(e));
  } else {
    for (int64_t e = 0; e < count; ++e) {
      tensors.push_back(take(each(e) + ".weight", {out, in}, expert_share_));
    }
  }
  for (const StoredTensor& expert : tensors)
    count_product(expert.dtype, expert_share_ * static_cast<double>(out * in));
  return pack(tensors);
}

std::shared_ptr<const quant::PackedWeight> Binder::expert_rows(const std::string& name, const Shape& shape,
                                                               int64_t first, int64_t rows) {
  const StoredTensor& all = take(name, shape, expert_share_);
  std::vector<StoredTensor> tensors;
  for (int64_t e = 0; e < shape[0]; ++e) tensors.push_back(all.slice(e).row_range(first, rows));
  count_product(all.dtype, expert_share_ * static_cast<double>(shape[0] * rows * shape[2]));
  return pack(tensors);
}

nn::Linear Binder::head(const nn::Linear& embedding, bool tied) {
  const int64_t vocab = embedding.out_features();
  const int64_t hidden = embedding.in_features();
  *multiplied_ += static_cast<double>(vocab * hidden);
  if (!tied) return {&runtime_, nn::Role::head, pack({&take("lm_head.weight", {vocab, hidden}), 1}), {}};
  account_.row_bytes += static_cast<double>(embedding.weight->stored_bytes());
  const StoredTensor* stored = checkpoint_.find("lm_head.weight");
  if (stored != nullptr) {
    const StoredTensor* table = checkpoint_.find("model.embed_tokens.weight");
    const bool equal = stored->dtype == table->dtype && stored->shape == table->shape &&
                       std::ranges::equal(stored->data, table->data) &&
                       std::ranges::equal(stored->scales, table->scales) &&
                       std::ranges::equal(stored->biases, table->biases);
    if (!equal) {
      fail(ErrorCode::format,
           "[{}] tie_word_embeddings: expected no head or one equal to the embedding, got another",
           stored->source);
    }
    ignore("lm_head.weight");
  }
  return embedding;
}

quant::Packer Binder::finish() {
  for (const StoredTensor& tensor : checkpoint_.tensors()) {
    if (taken_.contains(tensor.name)) continue;
    fail(ErrorCode::unsupported,
         "[{}] tensor table: expected only tensors that {} computes with, got {} {} in addition",
         tensor.source, checkpoint_.architecture(), tensor.name, tensor.shape.str());
  }
  return std::move(packer_);
}

}  // namespace lockstep

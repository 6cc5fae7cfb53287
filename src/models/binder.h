// Binds a checkpoint's tensors to a model's fields, once: every shape is checked, every tensor must
// be taken, and all go to one packer in the end.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lockstep/checkpoint.h"
#include "nn/linear.h"
#include "nn/runtime.h"
#include "quant/pack.h"

namespace lockstep {

class Binder {
 public:
  /// `source` is that of the checkpoint's tensors; it and the checkpoint are used until all weights are
  /// packed.
  Binder(const Checkpoint& checkpoint, const nn::Runtime& runtime, quant::Source source)
      : checkpoint_(checkpoint), runtime_(runtime), source_(std::move(source)) {}

  const Config& config() const { return checkpoint_.config(); }
  const nn::Runtime& runtime() const { return runtime_; }
  bool has(std::string_view name) const { return checkpoint_.find(name) != nullptr; }

  /// `name`.weight [out, in] and, if `bias`, `name`.bias [out].
  nn::Linear linear(const std::string& name, nn::Role role, int64_t out, int64_t in, bool bias = false);
  /// The embedding table `name`.weight [vocab, hidden], of which a token reads one row.
  nn::Linear embedding(const std::string& name, int64_t vocab, int64_t hidden);
  /// A vector [n], as f32.
  std::vector<float> vector(const std::string& name, int64_t n);
  /// From here on experts are bound of which a row uses `experts_per_token` of `experts`.
  void use_experts(int64_t experts_per_token, int64_t experts) {
    expert_share_ = static_cast<double>(experts_per_token) / static_cast<double>(experts);
  }
  /// From here on weights are bound that are multiplied only with rows whose logits are wanted.
  void use_logits_rows() { multiplied_ = &account_.logits_weights; }
  /// The experts of one projection: stacked (`stacked`.weight [E, out, in]) or one by one
  /// (`each(e)`.weight [out, in]), whichever the checkpoint holds.
  std::shared_ptr<const quant::PackedWeight> experts(const std::string& stacked,
                                                     const std::function<std::string(int64_t)>& each,
                                                     int64_t count, int64_t out, int64_t in);
  /// Rows [first, first + rows) of every expert of the stacked tensor `name` [E, out, in].
  std::shared_ptr<const quant::PackedWeight> expert_rows(const std::string& name, const Shape& shape,
                                                         int64_t first, int64_t rows);
  /// lm_head.weight, or the embedding again if the model ties them. A stored head under tying is
  /// harmless if it equals the embedding, and an error otherwise.
  nn::Linear head(const nn::Linear& embedding, bool tied);
  /// Declares a tensor harmless: it may be there and is not used.
  void ignore(const std::string& name) { taken_.insert(name); }

  /// What packs the weights that were taken. Error if a tensor was not taken.
  quant::Packer finish();

  /// What was taken, and what of it one row of a forward pass reads and multiplies with.
  struct Account {
    int64_t parameters = 0;      // elements of all tensors
    int64_t stored_bytes = 0;    // of all tensors
    double row_bytes = 0;        // read for one row, its logits included
    double row_weights = 0;      // multiplied with for every row
    double logits_weights = 0;   // in addition for a row whose logits are wanted
    double integer_weights = 0;  // of both, stored as integers; without the head
  };
  const Account& account() const { return account_; }

 private:
  /// `share` of the tensor is read for one row.
  const StoredTensor& take(const std::string& name, const Shape& shape, double share = 1);
  std::shared_ptr<const quant::PackedWeight> pack(std::span<const StoredTensor> experts);
  /// Counts weights of this type that a row is multiplied with.
  void count_product(DType dtype, double weights);

  const Checkpoint& checkpoint_;
  const nn::Runtime& runtime_;
  quant::Source source_;
  std::set<std::string> taken_;
  Account account_;
  double* multiplied_ = &account_.row_weights;
  double expert_share_ = 1;
  // Regions large enough that few of a model's weights come to lie across two.
  quant::PanelMemory memory_{size_t{256} << 20};
  quant::Packer packer_;
};

}  // namespace lockstep

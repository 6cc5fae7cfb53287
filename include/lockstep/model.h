// A model: config, weights and tokenizer. Immutable; any number of sessions share it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/text.h"

namespace lockstep {

struct Batch;
class Taps;
class Tensor;

/// How products are computed (design: numerics). f32: everything in f32. exact: activations as
/// 16-bit fixed point per block of 32 where weights are integers, f32 elsewhere. fast: of these, 8 bits per
/// 16 where that does little harm (nn/precision.h), and bf16 where weights are, if the processor has
/// products of them; attention in 16-bit fixed point, unless a session has another KV type.
enum class Precision { f32, exact, fast };
/// "f32", "exact", "fast"
std::string_view precision_name(Precision precision);
/// Error `invalid_argument` for another name.
Precision parse_precision(std::string_view name);
/// Error `invalid_argument` unless this processor runs these kernels; empty: the best there are.
void check_isa(std::string_view name);

/// When weights are packed into the layout that products read. Nothing but time and memory depends on it.
enum class Packing {
  at_load,  ///< before `load` returns
  /// The first pass reads weights from the file as it goes, and keeps none of them; `pack`, or the second
  /// pass, packs them. The first token comes sooner, the second later. As `at_load` where the weights are
  /// more than a quarter of the memory that the process may fill. Until they are packed passes take turns, an
  /// observer must not run the model, and the file must stay as it is: to take away what is being read ends
  /// the process.
  second_pass,
  /// The same, whatever their size, and `load` does not touch them: to look at a model, or to encode a text.
  on_use
};

/// How a model is loaded and computes.
struct ModelOptions {
  Precision precision = Precision::exact;
  std::string isa;           ///< kernels to use; empty: the best this processor runs
  int threads = 0;           ///< 0: as many as the machine gives this process
  std::string config_patch;  ///< JSON that replaces keys of the config (RFC 7396); empty: none
  /// Called with the share of the weights' bytes read so far, 0..1, from the loading thread, until all are
  /// packed or the first pass is over, and with 1 then. It must not use the model.
  std::function<void(double)> progress;
  Packing packing = Packing::at_load;
};

/// What a session must keep for a model: one KV cache a layer.
struct CacheShape {
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  std::vector<int64_t> windows;  ///< [layers]: keys a query sees, itself included; 0: all
};

/// Facts about a loaded model, as `inspect` prints them.
struct ModelInfo {
  std::string architecture;
  std::string format;
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t heads = 0;
  int64_t vocab = 0;
  int64_t experts = 0;  ///< 0: no mixture
  int64_t experts_per_token = 0;
  int64_t context = 0;  ///< positions the model was made for
  int64_t parameters = 0;
  int64_t stored_bytes = 0;              ///< weights as the file holds them
  int64_t token_bytes = 0;               ///< of these, read for one token of decode
  int64_t row_weights = 0;               ///< weights every row is multiplied with
  int64_t logits_weights = 0;            ///< in addition, for a row whose logits are wanted
  bool integers = false;                 ///< most of these are stored as integers
  std::vector<std::string> unread_keys;  ///< config keys that nothing read, all without influence
};

/// Config, weights and tokenizer, safe to use from many threads at once.
class Model {
 public:
  /// Loads a `.gguf` file or a model directory. Error if anything in config or weights is missing,
  /// misshapen, surplus or not computed by lockstep.
  static std::shared_ptr<const Model> load(const std::filesystem::path& path,
                                           const ModelOptions& options = {});
  ~Model();

  const ModelInfo& info() const;
  CacheShape cache_shape() const;
  Precision precision() const;
  std::string_view isa() const;
  int threads() const;

  /// Error `not_found` if the files hold no tokenizer.
  const Tokenizer& tokenizer() const;
  bool has_tokenizer() const;
  /// nullptr if the model has none.
  const ChatTemplate* chat_template() const;
  /// Ids that end a reply, sorted.
  const std::vector<int32_t>& end_ids() const;

  /// Packs what is not packed yet (`ModelOptions::packing`); otherwise the second pass does. Error `io`
  /// if weights cannot be read.
  void pack() const;

  /// One pass over the rows of a batch; appends to the caches, whose lengths are the caller's to
  /// advance. Returns the logits [rows asked for, vocab]. Error `io` if weights that are not packed yet
  /// cannot be read.
  Tensor forward(const Batch& batch, Taps& taps) const;

  struct State;

 private:
  explicit Model(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace lockstep

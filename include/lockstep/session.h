// A session: one mutable timeline of tokens and its KV cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "lockstep/model.h"
#include "lockstep/tensor.h"
#include "lockstep/trace.h"

namespace lockstep {

class KvCache;

/// Element type of the KV cache. i16: 12 or 13 bits of fixed point with a scale for each key and each value
/// of a head; attention rounds queries and weights likewise and sums in integers. q8 is lossy: 8 bits per
/// block of 32.
enum class KvType { f32, f16, i16, q8 };
/// "f32", "f16", "i16", "q8"
std::string_view kv_type_name(KvType type);
/// Error `invalid_argument` for another name.
KvType parse_kv_type(std::string_view name);

/// i16 for `fast`, else f16.
KvType default_kv_type(Precision precision);

/// What a session keeps, and how.
struct SessionOptions {
  int64_t context = 0;                 ///< most tokens the session holds; 0: the model's context length
  std::optional<KvType> kv_type = {};  ///< none: default_kv_type of the model's precision
  int64_t chunk = 256;                 ///< most rows of one forward pass in prefill; no result depends on it
};

/// A timeline of tokens with its keys and values. For one thread at a time.
class Session {
 public:
  explicit Session(std::shared_ptr<const Model> model, const SessionOptions& options = {});
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  /// Makes the timeline equal to `ids`, keeping the prefix that it already has in common with them,
  /// and returns the logits [vocab] after the last one. The whole sequence is always passed.
  /// `go_on` is called after each chunk with the length that is reached; if it returns false, what was
  /// computed stays, and no logits are returned (an empty tensor). Errors: `invalid_argument` (empty, id out
  /// of range), `context_full`.
  Tensor sync(std::span<const int32_t> ids, Taps& taps, const std::function<bool(int64_t)>& go_on = {});
  Tensor sync(std::span<const int32_t> ids);

  /// Appends tokens and returns the logits of each, [ids.size(), vocab].
  Tensor append(std::span<const int32_t> ids, Taps& taps);
  Tensor append(std::span<const int32_t> ids);

  /// Forgets all tokens from position `length` on.
  void rewind(int64_t length);
  /// A second timeline with the same past. Copies the cache.
  Session fork() const;

  const std::vector<int32_t>& tokens() const { return tokens_; }
  int64_t length() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t context() const { return context_; }
  const Model& model() const { return *model_; }
  const SessionOptions& options() const { return options_; }
  /// Bytes the KV cache holds now.
  int64_t cache_bytes() const;

 private:
  friend std::vector<Tensor> append_together(std::span<Session* const> sessions,
                                             std::span<const std::span<const int32_t>> ids, Taps& taps);
  void check(std::span<const int32_t> ids) const;
  void keep_room(int64_t count) const;
  Tensor run(std::span<const int32_t> ids, bool every_row, Taps& taps,
             const std::function<bool(int64_t)>& go_on = {});

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  int64_t context_ = 0;
  std::vector<int32_t> tokens_;
  std::unique_ptr<KvCache> cache_;
};

/// Appends ids[i] to sessions[i], all in one forward pass of ragged rows; the sessions share one
/// model. Returns the logits of each session's rows, [ids[i].size(), vocab].
std::vector<Tensor> append_together(std::span<Session* const> sessions,
                                    std::span<const std::span<const int32_t>> ids, Taps& taps);
std::vector<Tensor> append_together(std::span<Session* const> sessions,
                                    std::span<const std::span<const int32_t>> ids);

}  // namespace lockstep

// From logits to text: sampling, stop strings, log-probabilities, and the loop that joins them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/session.h"

namespace lockstep {

/// How the next token is chosen. Applied in this order: logit bias, repeat penalty, temperature,
/// top-k, top-p, min-p.
struct SamplingOptions {
  float temperature = 0;     ///< 0: greedy, ties go to the lower id
  int64_t top_k = 0;         ///< keep the k most likely; 0: all
  float top_p = 1;           ///< keep the fewest whose probabilities reach this sum
  float min_p = 0;           ///< keep those at least this times as likely as the most likely
  float repeat_penalty = 1;  ///< of tokens among the last `repeat_window`: logit / p, or * p below 0
  int64_t repeat_window = 64;
  uint64_t seed = 0;
  std::map<int32_t, float> logit_bias;
};

/// Chooses tokens. The random number of a choice is a function of (seed, position) alone, so sampled
/// text does not depend on batching, threads or what was sampled before.
class Sampler {
 public:
  /// Error `invalid_argument` naming the option that is out of range.
  explicit Sampler(const SamplingOptions& options);

  /// logits: [vocab]; context: all tokens so far; position: of the token to choose. Error
  /// `invalid_argument` if a logit is NaN or none is finite.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> context, int64_t position) const;

 private:
  SamplingOptions options_;
};

/// One token and the natural logarithm of its probability under the raw logits.
struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;
};

/// The chosen token and the `count` most likely ones, best first.
struct Logprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;
};
/// Of one row of logits [vocab]. A `count` below 1 gives no alternatives.
Logprobs logprobs(std::span<const float> logits, int32_t chosen, int64_t count);

/// Looks for stop strings in streamed text and holds back what may be the beginning of one.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops);

  /// Takes the next piece of text and returns what is certain not to belong to a stop string. After
  /// `stopped()` everything else is swallowed.
  std::string push(std::string_view piece);
  /// What was held back, at the end of the text.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

/// How a reply is made and where it ends.
struct GenerateOptions {
  int64_t max_tokens = 256;
  SamplingOptions sampling;
  std::vector<std::string> stop;    ///< strings that end the text; not part of it
  std::optional<int64_t> logprobs;  ///< this many alternatives a token
  Observer* observer = nullptr;     ///< sees every forward pass
  /// Called while the prompt is computed, with the tokens done and all of them; false stops.
  std::function<bool(int64_t, int64_t)> on_prompt;
};

/// Where the time of a reply went.
struct Timings {
  double ttft_ms = 0;      ///< from the start to the first token; 0: there was none
  double prefill_tps = 0;  ///< prompt tokens computed per second
  double pack_ms = 0;      ///< after the first token, for weights that its pass has read without packing them
  double decode_tps = 0;   ///< tokens per second after that
  int64_t reused = 0;      ///< prompt tokens taken from the session's past
};

/// A reply.
struct Generation {
  std::string text;
  std::vector<int32_t> ids;   ///< generated, the ending id excluded
  std::string finish_reason;  ///< "stop" (end id or stop string) or "length"
  std::vector<Logprobs> logprobs;
  Timings timings;
  uint64_t logits_hash = 0;  ///< FNV-1a of the last logits' bytes, NaN being one: equal runs, equal hash
};

/// Continues `prompt` (the whole sequence; the session reuses what it has). `on_text` gets certain
/// pieces of text as they come and returns false to stop early. Errors: as Session::sync.
Generation generate(Session& session, std::span<const int32_t> prompt, const GenerateOptions& options,
                    const std::function<bool(std::string_view)>& on_text = {});

/// The ids of a prompt: the chat template around one user message and an optional system message,
/// or, if `raw` or without a template, the text as it is, with BOS if the tokenizer adds it.
std::vector<int32_t> encode_prompt(const Model& model, std::string_view text,
                                   std::optional<std::string_view> system, bool raw);

}  // namespace lockstep

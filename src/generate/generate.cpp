#include "lockstep/generate.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <limits>

#include "lockstep/text.h"
#include "tensor/fail.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t hash_of(std::span<const float> logits) {
  uint64_t hash = 0xCBF29CE484222325U;
  for (const float logit : logits) {
    // Which of several NaN an instruction passes on is chance.
    auto bits = std::bit_cast<uint32_t>(std::isnan(logit) ? std::numeric_limits<float>::quiet_NaN() : logit);
    for (int i = 0; i < 4; ++i, bits >>= 8) hash = (hash ^ (bits & 0xFF)) * 0x100000001B3U;
  }
  return hash;
}

// Text of a run of tokens, with stop strings and the caller's interest applied.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, const GenerateOptions& options,
             const std::function<bool(std::string_view)>& on_text, std::string& text)
      : detokenizer_(tokenizer), filter_(options.stop), on_text_(on_text), text_(text) {}

  /// False: stop.
  bool push(int32_t id) { return emit(filter_.push(detokenizer_.push(id))) && !filter_.stopped(); }
  void finish() {
    emit(filter_.push(detokenizer_.finish()));
    emit(filter_.finish());
  }
  bool stopped() const { return filter_.stopped(); }

 private:
  bool emit(const std::string& piece) {
    text_ += piece;
    if (!piece.empty() && wanted_ && on_text_) wanted_ = on_text_(piece);
    return wanted_;
  }

  StreamingDetokenizer detokenizer_;
  StopFilter filter_;
  const std::function<bool(std::string_view)>& on_text_;
  std::string& text_;
  bool wanted_ = true;  // by the caller
};

}  // namespace

Generation generate(Session& session, std::span<const int32_t> prompt, const GenerateOptions& options,
                    const std::function<bool(std::string_view)>& on_text) {
  const Sampler sampler(options.sampling);
  const std::vector<int32_t>& ends = session.model().end_ids();
  Generation result;
  result.finish_reason = "length";
  TextStream stream(session.model().tokenizer(), options, on_text, result.text);
  const auto start = Clock::now();
  const auto past =
      std::mismatch(session.tokens().begin(), session.tokens().end(), prompt.begin(), prompt.end());
  result.timings.reused =
      std::min<int64_t>(past.first - session.tokens().begin(), static_cast<int64_t>(prompt.size()) - 1);
  Taps taps(options.observer);
  const auto all = std::ssize(prompt);
  Tensor logits = session.sync(
      prompt, taps, [&](int64_t done) { return !options.on_prompt || options.on_prompt(done, all); });
  const double prefill_seconds = seconds_since(start);
  result.timings.prefill_tps =
      static_cast<double>(session.length() - result.timings.reused) / prefill_seconds;
  if (logits.empty()) {
    result.finish_reason = "stop";
    return result;
  }
  result.timings.ttft_ms = prefill_seconds * 1e3;

  auto decode_start = Clock::now();
  int64_t passes = 0;  // of decode
  for (int64_t n = 0; n < options.max_tokens; ++n) {
    const int32_t id = sampler.sample(logits.values(), session.tokens(), session.length());
    if (std::binary_search(ends.begin(), ends.end(), id)) {
      result.finish_reason = "stop";
      break;
    }
    result.ids.push_back(id);
    if (options.logprobs) {
      result.logprobs.push_back(logprobs(logits.values(), id, *options.logprobs));
    }
    if (!stream.push(id)) {
      result.finish_reason = "stop";
      break;
    }
    if (n + 1 == options.max_tokens || session.length() == session.context()) break;
    if (n == 0) {
      const auto pack_start = Clock::now();
      session.model().pack();
      result.timings.pack_ms = seconds_since(pack_start) * 1e3;
      decode_start = Clock::now();
    }
    logits = session.append({&id, 1}, taps);
    ++passes;
  }
  stream.finish();
  if (stream.stopped()) result.finish_reason = "stop";
  const double decode_seconds = seconds_since(decode_start);
  if (decode_seconds > 0) result.timings.decode_tps = static_cast<double>(passes) / decode_seconds;
  result.logits_hash = hash_of(logits.values());
  return result;
}

std::vector<int32_t> encode_prompt(const Model& model, std::string_view text,
                                   std::optional<std::string_view> system, bool raw) {
  const Tokenizer& tokenizer = model.tokenizer();
  const ChatTemplate* chat = model.chat_template();
  if (raw || chat == nullptr) {
    if (system) {
      fail(ErrorCode::invalid_argument,
           "[prompt] system: expected a model with a chat template, and no --raw, got neither");
    }
    return tokenizer.encode(text, true);
  }
  std::vector<Message> messages;
  if (system) messages.push_back({"system", std::string(*system)});
  messages.push_back({"user", std::string(text)});
  return tokenizer.encode(chat->render(messages, true), false);
}

}  // namespace lockstep

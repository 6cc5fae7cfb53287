#include "lockstep/session.h"

#include <algorithm>
#include <utility>

#include "cache/kv_cache.h"
#include "generate/batch.h"
#include "tensor/fail.h"

namespace lockstep {

std::string_view kv_type_name(KvType type) {
  switch (type) {
    case KvType::f32: return "f32";
    case KvType::f16: return "f16";
    case KvType::i16: return "i16";
    default: return "q8";
  }
}

KvType parse_kv_type(std::string_view name) {
  for (KvType type : {KvType::f32, KvType::f16, KvType::i16, KvType::q8}) {
    if (kv_type_name(type) == name) return type;
  }
  fail(ErrorCode::invalid_argument, "[kv-type] name: expected f32, f16, i16 or q8, got {}", name);
}

KvType default_kv_type(Precision precision) {
  return precision == Precision::fast ? KvType::i16 : KvType::f16;
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options)
    : model_(std::move(model)),
      options_(options),
      context_(options.context > 0 ? options.context : model_->info().context),
      cache_(std::make_unique<KvCache>(model_->cache_shape(),
                                       options.kv_type.value_or(default_kv_type(model_->precision())))) {
  const int64_t asked = options.context != 0 ? options.context : context_;
  if (asked < 1 || asked > (int64_t{1} << 31) - 1) {
    fail(ErrorCode::invalid_argument, "[session] context: expected 1 to 2^31 - 1 tokens, got {}{}", asked,
         options.context == 0 ? " from the model; -c sets another" : "");
  }
  if (options.chunk < 1) {
    fail(ErrorCode::invalid_argument, "[session] chunk: expected at least 1 row, got {}", options.chunk);
  }
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

void Session::check(std::span<const int32_t> ids) const {
  if (ids.empty()) {
    fail(ErrorCode::invalid_argument, "[session] tokens: expected at least one, got none");
  }
  const int64_t vocab = model_->info().vocab;
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab) {
      fail(ErrorCode::invalid_argument, "[session] token id: expected 0 to {}, got {}", vocab - 1, id);
    }
  }
}

void Session::keep_room(int64_t count) const {
  if (length() + count > context_) {
    fail(ErrorCode::context_full, "[session] context: expected at most {} tokens, got {}", context_,
         length() + count);
  }
}

// Runs checked tokens in chunks and gathers the logits of every row, or of the last.
Tensor Session::run(std::span<const int32_t> ids, bool every_row, Taps& taps,
                    const std::function<bool(int64_t)>& go_on) {
  const int64_t vocab = model_->info().vocab;
  Tensor result({every_row ? static_cast<int64_t>(ids.size()) : 1, vocab});
  const auto chunk = static_cast<size_t>(options_.chunk);
  if (ids.size() > chunk) model_->pack();  // or the first of several passes would read in vain
  for (size_t begin = 0; begin < ids.size(); begin += chunk) {
    const auto part = ids.subspan(begin, std::min(chunk, ids.size() - begin));
    Batch batch;
    batch.add(*cache_, part, length(), context_, every_row);
    const bool last = begin + part.size() == ids.size();
    if (!every_row && !last) batch.logits_rows.clear();
    const Tensor logits = model_->forward(batch, taps);
    const int64_t row = every_row ? static_cast<int64_t>(begin) : 0;
    if (logits.shape()[0] > 0) std::copy_n(logits.data(), logits.size(), result.row(row));
    tokens_.insert(tokens_.end(), part.begin(), part.end());
    cache_->drop_before(length());
    if (go_on && !go_on(length())) return {};
  }
  return result;
}

Tensor Session::sync(std::span<const int32_t> ids, Taps& taps, const std::function<bool(int64_t)>& go_on) {
  check(ids);
  if (static_cast<int64_t>(ids.size()) > context_) {
    fail(ErrorCode::context_full, "[session] context: expected at most {} tokens, got {}", context_,
         ids.size());
  }
  const auto common = std::mismatch(tokens_.begin(), tokens_.end(), ids.begin(), ids.end()).first;
  // The last token is always computed: its logits are what the caller wants.
  rewind(std::min<int64_t>(common - tokens_.begin(), static_cast<int64_t>(ids.size()) - 1));
  Tensor logits = run(ids.subspan(static_cast<size_t>(length())), false, taps, go_on);
  return logits.empty() ? std::move(logits) : std::move(logits).reshaped({model_->info().vocab});
}

Tensor Session::sync(std::span<const int32_t> ids) {
  Taps none;
  return sync(ids, none);
}

Tensor Session::append(std::span<const int32_t> ids, Taps& taps) {
  check(ids);
  keep_room(static_cast<int64_t>(ids.size()));
  return run(ids, true, taps);
}

Tensor Session::append(std::span<const int32_t> ids) {
  Taps none;
  return append(ids, none);
}

void Session::rewind(int64_t length) {
  if (length < 0 || length > this->length()) {
    fail(ErrorCode::invalid_argument, "[session] rewind: expected 0 to {}, got {}", this->length(), length);
  }
  if (length == this->length()) return;
  const std::vector<int32_t> kept(tokens_.begin(), tokens_.begin() + length);
  const bool possible = cache_->rewind(length);
  tokens_.clear();
  if (possible) {
    tokens_ = kept;
  } else if (!kept.empty()) {
    // The window has dropped keys that are needed again: compute them anew.
    Taps none;
    run(kept, false, none);
  }
}

Session Session::fork() const {
  Session copy(model_, options_);
  copy.tokens_ = tokens_;
  copy.cache_ = std::make_unique<KvCache>(*cache_);
  return copy;
}

int64_t Session::cache_bytes() const { return cache_->bytes(); }

std::vector<Tensor> append_together(std::span<Session* const> sessions,
                                    std::span<const std::span<const int32_t>> ids) {
  Taps none;
  return append_together(sessions, ids, none);
}

std::vector<Tensor> append_together(std::span<Session* const> sessions,
                                    std::span<const std::span<const int32_t>> ids, Taps& taps) {
  if (sessions.empty() || sessions.size() != ids.size()) {
    fail(ErrorCode::invalid_argument,
         "[session] append_together: expected tokens for each of {} sessions, got {}", sessions.size(),
         ids.size());
  }
  Batch batch;
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i]->model_ != sessions[0]->model_) {
      fail(ErrorCode::invalid_argument,
           "[session] append_together: expected sessions of one model, got another in place {}", i);
    }
    if (std::find(sessions.begin(), sessions.begin() + static_cast<ptrdiff_t>(i), sessions[i]) !=
        sessions.begin() + static_cast<ptrdiff_t>(i)) {
      fail(ErrorCode::invalid_argument,
           "[session] append_together: expected each session once, got place {} again", i);
    }
    sessions[i]->check(ids[i]);
    sessions[i]->keep_room(static_cast<int64_t>(ids[i].size()));
    batch.add(*sessions[i]->cache_, ids[i], sessions[i]->length(), sessions[i]->context_, true);
  }
  const Tensor logits = sessions[0]->model_->forward(batch, taps);
  std::vector<Tensor> results;
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session& session = *sessions[i];
    session.tokens_.insert(session.tokens_.end(), ids[i].begin(), ids[i].end());
    session.cache_->drop_before(session.length());
    const int64_t rows = batch.runs[i].rows;
    Tensor& part = results.emplace_back(Shape{rows, logits.row_size()});
    std::copy_n(logits.row(batch.runs[i].first_row), part.size(), part.data());
  }
  return results;
}

}  // namespace lockstep

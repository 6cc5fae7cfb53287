#include "lockstep/text.h"
#include "text/ffi.h"
#include "text/state.h"

namespace lockstep {

struct StreamingDetokenizer::State {
  text::DetokenizerHandle handle;
};

StreamingDetokenizer::StreamingDetokenizer(const Tokenizer& tokenizer)
    : state_(std::make_unique<State>(
          text::DetokenizerHandle(lst_detokenizer_new(tokenizer.state_->handle.get(), 1)))) {}
StreamingDetokenizer::~StreamingDetokenizer() = default;
StreamingDetokenizer::StreamingDetokenizer(StreamingDetokenizer&&) noexcept = default;
StreamingDetokenizer& StreamingDetokenizer::operator=(StreamingDetokenizer&&) noexcept = default;

std::string StreamingDetokenizer::push(int32_t id) {
  text::Buffer out;
  text::call(
      [&](lst_buffer* error) { return lst_detokenizer_push(state_->handle.get(), id, out.out(), error); });
  return out.str();
}

std::string StreamingDetokenizer::finish() {
  text::Buffer out;
  text::call(
      [&](lst_buffer* error) { return lst_detokenizer_finish(state_->handle.get(), out.out(), error); });
  return out.str();
}

}  // namespace lockstep

#include <nlohmann/json.hpp>

#include "lockstep/text.h"
#include "text/ffi.h"
#include "text/state.h"

namespace lockstep {

struct ChatTemplate::State {
  text::TemplateHandle handle;
};

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer) {
  if (!tokenizer.chat_template()) {
    fail(ErrorCode::not_found, "[chat template] model: expected one beside the tokenizer, got none");
  }
  lst_template* handle = nullptr;
  text::call([&](lst_buffer* error) {
    return lst_template_from_tokenizer(tokenizer.state_->handle.get(), &handle, error);
  });
  state_ = std::make_unique<State>(text::TemplateHandle(handle));
}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(std::span<const Message> messages, bool add_generation_prompt) const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Message& message : messages) {
    list.push_back({{"role", message.role}, {"content", message.content}});
  }
  std::string json;
  try {
    json = list.dump();
  } catch (const nlohmann::json::exception&) {
    fail(ErrorCode::invalid_argument, "[chat template] messages: expected UTF-8, got other bytes");
  }
  text::Buffer out;
  text::call([&](lst_buffer* error) {
    return lst_template_render(state_->handle.get(), text::view(json), {}, {}, add_generation_prompt ? 1 : 0,
                               out.out(), error);
  });
  return out.str();
}

}  // namespace lockstep

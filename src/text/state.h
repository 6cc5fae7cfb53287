// What a Tokenizer holds, for its neighbours in this folder.
#pragma once

#include "lockstep/text.h"
#include "text/ffi.h"

namespace lockstep {

struct Tokenizer::State {
  text::TokenizerHandle handle;
  lst_info info{};
};

}  // namespace lockstep

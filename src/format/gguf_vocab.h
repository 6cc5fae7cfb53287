// The tokenizer that a GGUF's metadata describes.
#pragma once

#include "format/gguf.h"
#include "lockstep/text.h"

namespace lockstep {

/// Views into the file. Error `format` for values of another type or ids out of range.
GgufVocab gguf_vocab(const Gguf& gguf);

}  // namespace lockstep

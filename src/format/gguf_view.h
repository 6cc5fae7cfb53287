// A GGUF seen as a Hugging Face checkpoint: its metadata as config keys, its tensors by their names.
#pragma once

#include <string>
#include <vector>

#include "format/gguf.h"
#include "lockstep/checkpoint.h"

namespace lockstep {

/// Name of the architecture in lockstep: a `llama` with experts is a "mixtral". Error `format` if
/// the file names none.
std::string gguf_architecture(const Gguf& gguf, const std::string& where);

/// The config, as JSON with Hugging Face's keys. Metadata of the architecture that has no such key
/// appears as "gguf:NAME", so that reading is accounted for it too.
std::string gguf_config(const Gguf& gguf, const std::string& architecture, const std::string& where);

/// The tensors under Hugging Face's names. A name without a translation keeps its own.
std::vector<StoredTensor> gguf_tensors(const Gguf& gguf, const std::string& architecture,
                                       const Config& config, const std::string& where);

}  // namespace lockstep

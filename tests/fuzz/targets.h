// What is fuzzed: each target feeds one input to the code that reads it. A value or a lockstep::Error is
// well; a crash, a leak, a large allocation or a hang is a bug, and so is what `require` finds.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep::fuzz {

using Target = void(const uint8_t* data, size_t size);

Target fuzz_gguf;         // a .gguf file: header, view, tokenizer, model
Target fuzz_safetensors;  // a model.safetensors beside a sound config
Target fuzz_index;        // a model.safetensors.index.json beside two shards
Target fuzz_config;       // config.json, NUL, generation_config.json beside sound weights
Target fuzz_zip;          // a wheel
Target fuzz_page;         // a page of a package index
Target fuzz_tokenizer;    // tokenizer.json, NUL, tokenizer_config.json
Target fuzz_template;     // a chat template
Target fuzz_trace;        // manifest.json, NUL, events.jsonl of a trace
Target fuzz_bundle;       // what is said of a bundle, NUL, its tensors

}  // namespace lockstep::fuzz

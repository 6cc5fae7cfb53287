#include "format/gguf.h"

#include "format/gguf_view.h"
#include "format/gguf_vocab.h"
#include "fuzz/targets.h"
#include "fuzz/tiny_model.h"

namespace lockstep::fuzz {

void fuzz_gguf(const uint8_t* data, size_t size) {
  attempt([&] {
    const Gguf gguf(bytes_of(data, size), "f.gguf");
    attempt([&] {
      const Tokenizer tokenizer = Tokenizer::from_gguf(gguf_vocab(gguf));
      tokenizer.decode(tokenizer.encode("Two words, 12 \xC3\xA9\xE2\x82\xAC", true), false);
    });
    const std::string architecture = gguf_architecture(gguf, "f.gguf");
    const Config config(gguf_config(gguf, architecture, "f.gguf"), "f.gguf");
    for (const StoredTensor& tensor : gguf_tensors(gguf, architecture, config, "f.gguf")) {
      require(tensor.stored_bytes() == static_cast<int64_t>(tensor.data.size()));
    }
    static const Folder folder;
    folder.write("f.gguf", text_of(data, size));
    load_and_run(folder.path() / "f.gguf");
  });
}

}  // namespace lockstep::fuzz

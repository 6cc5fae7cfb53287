#include "format/safetensors.h"

#include "fuzz/targets.h"
#include "fuzz/tiny_model.h"

namespace lockstep::fuzz {

void fuzz_safetensors(const uint8_t* data, size_t size) {
  attempt([&] {
    size_t bytes = 0;
    for (const SafeTensor& tensor : read_safetensors(bytes_of(data, size), "f.safetensors").tensors) {
      bytes += tensor.data.size();
    }
    require(bytes < size);
  });
  static const Folder plain;
  static const Folder mlx;
  static bool first = true;
  if (std::exchange(first, false)) {
    const std::string config(kTinyConfig);
    plain.write("config.json", config);
    mlx.write("config.json",
              config.substr(0, config.size() - 1) + R"(, "quantization": {"bits": 4, "group_size": 32}})");
  }
  for (const Folder* folder : {&plain, &mlx}) {
    folder->write("model.safetensors", text_of(data, size));
    attempt([&] { load_and_run(folder->path()); });
  }
}

}  // namespace lockstep::fuzz

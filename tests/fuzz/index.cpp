#include "fuzz/targets.h"
#include "fuzz/tiny_model.h"
#include "lockstep/checkpoint.h"

namespace lockstep::fuzz {

void fuzz_index(const uint8_t* data, size_t size) {
  static const Folder folder;
  static bool first = true;
  if (std::exchange(first, false)) {
    folder.write("config.json", kTinyConfig);
    write_tiny_weights(folder.path() / "a");
    const float value = 1;
    const NamedTensor tensor = {"b", DType::f32, {1}, std::as_bytes(std::span(&value, 1))};
    save_tensors(folder.path() / "b", {&tensor, 1});
  }
  folder.write("model.safetensors.index.json", text_of(data, size));
  attempt([&] {
    for (const std::filesystem::path& file : Checkpoint::open(folder.path()).weight_files()) {
      require(file.parent_path() == folder.path());
    }
  });
}

}  // namespace lockstep::fuzz

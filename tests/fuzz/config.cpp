#include "fuzz/targets.h"
#include "fuzz/tiny_model.h"
#include "lockstep/checkpoint.h"

namespace lockstep::fuzz {

void fuzz_config(const uint8_t* data, size_t size) {
  static const Folder folder;
  static bool first = true;
  if (std::exchange(first, false)) write_tiny_weights(folder.path() / "model.safetensors");
  const auto [config, generation] = split(text_of(data, size));
  folder.write("config.json", config);
  folder.write("generation_config.json", generation.empty() ? "{}" : generation);
  attempt([&] { load_and_run(folder.path()); });
}

}  // namespace lockstep::fuzz

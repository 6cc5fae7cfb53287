#include <sstream>

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"

namespace lockstep::fuzz {
namespace {

// "NAME DTYPE AXIS..." a line: tensors of a pattern.
struct Payload {
  std::vector<std::string> names;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<NamedTensor> tensors;
};

Payload payload_of(const std::string& lines) {
  Payload all;
  std::istringstream text(lines);
  for (std::string line; std::getline(text, line) && all.names.size() < 16;) {
    std::istringstream words(line);
    std::string name, dtype;
    words >> name >> dtype;
    Shape shape;
    size_t size = dtype == "F32" ? 4 : 1;
    for (int64_t axis = 0; words >> axis && shape.rank() < 3;) {
      if (axis < 0 || axis > 4096 || size * static_cast<size_t>(axis) > 65536) return all;
      shape = shape.rank() == 0   ? Shape{axis}
              : shape.rank() == 1 ? Shape{shape[0], axis}
                                  : Shape{shape[0], shape[1], axis};
      size *= static_cast<size_t>(axis);
    }
    std::vector<uint8_t>& bytes = all.bytes.emplace_back(size);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i % 4 == 3 ? 0x3f : i * 37);
    all.names.push_back(name);
    all.tensors.push_back(
        {name, dtype == "F32" ? DType::f32 : DType::u8, shape, std::as_bytes(std::span(bytes))});
  }
  return all;
}

}  // namespace

void fuzz_bundle(const uint8_t* data, size_t size) {
  static const Folder folder;
  const auto file = folder.path() / "bundle.safetensors";
  const auto [facts, lines] = split(text_of(data, size));
  ModelOptions options;
  options.threads = 1;
  attempt([&] {
    const Payload payload = payload_of(std::string(lines));
    save_tensors(file, payload.tensors, {{"lockstep-bundle", std::string(facts)}});
    const DiffReport report = replay_bundle(file, options);
    require(!report_text(report, false).empty() && !report_json(report).empty());
  });
}

}  // namespace lockstep::fuzz

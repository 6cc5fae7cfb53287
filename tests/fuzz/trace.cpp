#include <cmath>

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"

namespace lockstep::fuzz {

void fuzz_trace(const uint8_t* data, size_t size) {
  static const Folder folder;
  static bool first = true;
  if (std::exchange(first, false)) {
    const Tensor small = Tensor::from({2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
    const Tensor heads = Tensor::from({2, 2, 2}, std::vector<float>{1, 0, 3, 4, -5, NAN, 7, 8});
    const std::vector<NamedTensor> tensors = {NamedTensor::of("a", small), NamedTensor::of("h", heads)};
    save_tensors(folder.path() / "tensors-00000.safetensors", tensors);
  }
  const auto [manifest, events] = split(text_of(data, size));
  folder.write("manifest.json", manifest);
  folder.write("events.jsonl", events);
  attempt([&] {
    const Trace trace = Trace::open(folder.path());
    const DiffReport report = diff(trace, trace, Floor());
    require(report.verdict != Verdict::divergent);
    require(!report_text(report, false).empty() && !report_json(report).empty() &&
            !report_html(report).empty());
  });
}

}  // namespace lockstep::fuzz

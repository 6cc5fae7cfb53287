#include <cstring>
#include <numeric>
#include <vector>

#include "fuzz/support.h"
#include "fuzz/targets.h"
#include "lockstep/checkpoint.h"
#include "lockstep/divergence.h"

namespace lockstep::fuzz {
namespace {

// The tensors that events may name: a [2, 3] and h [2, 2, 2], of given values, then of 1, 2, 3 and so on.
void write_shard(const Folder& folder, std::string_view values) {
  std::vector<float> all(14);
  std::iota(all.begin(), all.end(), 1.0F);
  if (!values.empty())
    std::memcpy(all.data(), values.data(), std::min(values.size(), all.size() * sizeof(float)));
  const Tensor a = Tensor::from({2, 3}, std::vector<float>(all.begin(), all.begin() + 6));
  const Tensor h = Tensor::from({2, 2, 2}, std::vector<float>(all.begin() + 6, all.end()));
  save_tensors(folder.path() / "tensors-00000.safetensors",
               std::vector<NamedTensor>{NamedTensor::of("a", a), NamedTensor::of("h", h)});
}

Trace trace_of(const Folder& folder, std::string_view manifest, std::string_view events,
               std::string_view values) {
  folder.write("manifest.json", manifest);
  folder.write("events.jsonl", events);
  write_shard(folder, values);
  return Trace::open(folder.path());
}

}  // namespace

// The input: manifest, events, floor and values, divided by NUL. Hashes are checked only where a manifest
// names their rule, so that other values get as far as the comparison.
void fuzz_trace(const uint8_t* data, size_t size) {
  static const Folder ours, theirs;
  const auto [manifest, rest] = split(text_of(data, size));
  const auto [events, more] = split(rest);
  const auto [floor_text, values] = split(more);
  attempt([&] {
    const Trace reference = trace_of(theirs, manifest, events, {});
    const Trace subject = trace_of(ours, manifest, events, values);
    theirs.write("floor.json", floor_text);
    const Floor floor = floor_text.empty() ? Floor() : Floor(theirs.path() / "floor.json", "f32/f32");
    require(diff(reference, reference, floor).verdict != Verdict::divergent);
    const DiffReport report = diff(subject, reference, floor);
    require(!report_text(report, false).empty() && !report_json(report).empty() &&
            !report_html(report).empty());
  });
}

}  // namespace lockstep::fuzz

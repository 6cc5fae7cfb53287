#include "support/traces.h"

#include "support/fixtures.h"

namespace lockstep::test {

std::filesystem::path captured(const std::string& name) { return data_path("traces/" + name); }
std::filesystem::path model_of(const std::string& name) { return data_path("models/" + name); }
std::filesystem::path subject(const std::string& name) { return data_path("subjects/" + name); }

TraceOptions follow(const Trace& reference) {
  TraceOptions options;
  options.sequences = reference.sequences;
  options.level = reference.level;
  options.model.threads = 2;
  return options;
}

TraceOptions follow(const Trace& reference, const Floor& floor) {
  TraceOptions options = follow(reference);
  options.ties = {&reference, &floor};
  return options;
}

Trace edited(const Trace& trace, const std::function<bool(TraceEvent&, std::vector<float>&)>& edit) {
  Trace copy;
  copy.engine = trace.engine;
  copy.sequences = trace.sequences;
  copy.sites = trace.sites;
  copy.where = "edited";
  for (const TraceEvent& event : trace.events()) {
    TraceEvent changed = event;
    std::vector<float> values(event.values.begin(), event.values.end());
    if (edit(changed, values)) copy.add(changed, values);
  }
  return copy;
}

}  // namespace lockstep::test

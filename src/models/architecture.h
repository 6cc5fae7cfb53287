// What an architecture provides, and the registry through which a model file makes itself known.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "generate/batch.h"
#include "lockstep/checkpoint.h"
#include "lockstep/model.h"
#include "lockstep/trace.h"
#include "nn/runtime.h"

namespace lockstep {

class Binder;

/// One model: bound weights and the forward pass over them.
class Architecture {
 public:
  virtual ~Architecture() = default;
  /// One pass over the batch's rows. Returns the logits [batch.logits_rows.size(), vocab].
  virtual Tensor forward(const Batch& batch, Taps& tap) const = 0;
  virtual CacheShape cache_shape() const = 0;
};

/// An entry of the registry. Declared once in the model's file, at namespace scope.
struct ArchitectureEntry {
  using Make = std::unique_ptr<Architecture> (*)(Binder& binder);

  ArchitectureEntry(std::string_view name, Make make);

  std::string_view name;
  Make make;
};

/// The entry of a name; nullptr if there is none.
const ArchitectureEntry* find_architecture(std::string_view name);
/// All names, sorted.
std::vector<std::string_view> architecture_names();

}  // namespace lockstep

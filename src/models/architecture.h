// What an architecture provides, and the registry through which a model file makes itself known.
#pragma once

#include <memory>
#include <string_view>

#include "generate/batch.h"
#include "lockstep/checkpoint.h"
#include "lockstep/trace.h"
#include "models/sizes.h"

namespace lockstep {

class Binder;

/// One model: bound weights and the forward pass over them.
class Architecture {
 public:
  virtual ~Architecture() = default;
  /// One pass over the batch's rows. Returns the logits [batch.logits_rows.size(), vocab].
  virtual Tensor forward(const Batch& batch, Taps& tap) const = 0;
};

/// An entry of the registry. Declared once in the model's file, at namespace scope.
struct ArchitectureEntry {
  using Sizes = TransformerSizes (*)(const Config& config);
  using Make = std::unique_ptr<Architecture> (*)(Binder& binder, TransformerSizes sizes);

  ArchitectureEntry(std::string_view name, Sizes sizes, Make make);

  std::string_view name;
  Sizes sizes;  // error `format` if they do not fit together
  Make make;
};

/// The entry of a checkpoint. Error `unsupported`, naming those there are, if it has none.
const ArchitectureEntry& architecture_of(const Checkpoint& checkpoint);

}  // namespace lockstep

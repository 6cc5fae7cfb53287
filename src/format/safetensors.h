// The safetensors container: a JSON table of tensors and their bytes. Format: the README of
// huggingface/safetensors.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "lockstep/tensor.h"

namespace lockstep {

struct SafeTensor {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  std::span<const std::byte> data;
};

struct SafeTensors {
  std::vector<SafeTensor> tensors;              // in the order of their bytes
  std::map<std::string, std::string> metadata;  // "__metadata__"
};

/// Parses and checks the header; tensors must lie in the file side by side, without overlap or gap.
/// Error `format` or `unsupported` naming tensor and byte offset. `where` names the file.
SafeTensors read_safetensors(std::span<const std::byte> bytes, const std::string& where);

}  // namespace lockstep

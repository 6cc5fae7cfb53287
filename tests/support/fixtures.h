// Reading the fixtures that scripts/fixtures makes from the reference implementations.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "lockstep/tensor.h"

namespace lockstep::test {

/// tests/data/NAME
std::filesystem::path data_path(const std::string& name);

/// One tensor of a safetensors fixture.
struct Array {
  DType dtype = DType::f32;
  Shape shape;
  std::vector<std::byte> bytes;

  template <typename T>
  std::span<const T> as() const {
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
  }
  std::span<const float> floats() const { return as<float>(); }
  std::span<const int32_t> ints() const { return as<int32_t>(); }
};

/// All tensors of a safetensors file below tests/data.
std::map<std::string, Array> load_arrays(const std::string& name);

/// Sum of squared differences over the sum of squares of `expected`, in f64.
double nmse(std::span<const float> actual, std::span<const float> expected);

}  // namespace lockstep::test

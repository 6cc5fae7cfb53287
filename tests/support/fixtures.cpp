#include "support/fixtures.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace lockstep::test {

std::filesystem::path data_path(const std::string& name) {
  return std::filesystem::path(LOCKSTEP_TEST_DATA) / name;
}

// Read here without the engine's parser: a fixture must not depend on what it tests.
std::map<std::string, Array> load_arrays(const std::string& name) {
  std::ifstream file(data_path(name), std::ios::binary);
  if (!file) throw std::runtime_error("no fixture " + name);
  uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof(length));
  std::string header(length, ' ');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const std::map<std::string, DType> dtypes = {
      {"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16},
      {"F64", DType::f64}, {"I32", DType::i32}, {"I64", DType::i64},
      {"U8", DType::u8},   {"U32", DType::u32}, {"BOOL", DType::boolean}};
  std::map<std::string, Array> arrays;
  const nlohmann::json entries = nlohmann::json::parse(header);
  for (const auto& [key, value] : entries.items()) {
    if (key == "__metadata__") continue;
    const auto dims = value["shape"].get<std::vector<int64_t>>();
    const auto offsets = value["data_offsets"].get<std::vector<int64_t>>();
    Array array{dtypes.at(value["dtype"]), Shape(std::span<const int64_t>(dims)), {}};
    array.bytes.resize(static_cast<size_t>(offsets[1] - offsets[0]));
    file.seekg(static_cast<std::streamoff>(8 + length) + offsets[0]);
    file.read(reinterpret_cast<char*>(array.bytes.data()), static_cast<std::streamsize>(array.bytes.size()));
    if (!file) throw std::runtime_error("fixture cut short: " + name);
    arrays.emplace(key, std::move(array));
  }
  return arrays;
}

double nmse(std::span<const float> actual, std::span<const float> expected) {
  if (actual.size() != expected.size()) throw std::runtime_error("nmse: sizes differ");
  double error = 0;
  double energy = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = static_cast<double>(actual[i]) - expected[i];
    error += difference * difference;
    energy += static_cast<double>(expected[i]) * expected[i];
  }
  return error / energy;
}

}  // namespace lockstep::test

// What the targets share.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "lockstep/error.h"

namespace lockstep::fuzz {

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline std::span<const std::byte> bytes_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const std::byte*>(data), size};
}

/// What comes before the first NUL, and what comes after.
inline std::pair<std::string_view, std::string_view> split(std::string_view input) {
  const size_t nul = input.find('\0');
  if (nul == std::string_view::npos) return {input, {}};
  return {input.substr(0, nul), input.substr(nul + 1)};
}

/// What must hold whatever the input. No Error, so that nothing catches it.
inline void require(bool holds) {
  if (!holds) throw std::logic_error("fuzzing: a requirement does not hold");
}

/// Runs `step`; an Error is as good as a value, if its message says where.
template <typename Step>
void attempt(const Step& step) {
  try {
    step();
  } catch (const Error& error) {
    require(error.what()[0] == '[');
  }
}

/// A folder for code that reads files, gone with the process.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "lockstep-fuzz-XXXXXX").string();
    require(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  void write(const std::string& name, std::string_view text) const {
    std::ofstream file(path_ / name, std::ios::binary);
    file.write(text.data(), static_cast<std::streamsize>(text.size()));
    require(file.good());
  }

 private:
  std::filesystem::path path_;
};

}  // namespace lockstep::fuzz

#include "format/write_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <string>

namespace lockstep {
namespace {

namespace fs = std::filesystem;

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(WriteFile, ReplacesWhatALinkPointsTo) {
  const fs::path folder = fs::path(testing::TempDir()) / ("links-" + std::to_string(::getpid()));
  fs::create_directories(folder / "there");
  std::ofstream(folder / "there/file") << "before";
  fs::create_symlink("there/file", folder / "link");
  fs::create_symlink("there/new", folder / "to-nothing");
  const std::string text = "after";
  const std::span<const std::byte> part = std::as_bytes(std::span(text));
  for (const char* name : {"link", "to-nothing"}) {
    write_file(folder / name, {{part}});
    EXPECT_TRUE(fs::is_symlink(folder / name)) << name;
    EXPECT_EQ(contents(folder / name), text) << name;
  }
  EXPECT_EQ(contents(folder / "there/file"), text);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder / "there"), {}), 2) << "nothing else is left";
  fs::remove_all(folder);
}

}  // namespace
}  // namespace lockstep

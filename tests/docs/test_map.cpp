// docs/MAP.md and README.md name paths of this repository; all of them exist.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>

namespace lockstep {
namespace {

const std::filesystem::path kRoot = LOCKSTEP_ROOT;

TEST(Documents, NameOnlyPathsThatExist) {
  std::ifstream file(kRoot / "docs/MAP.md");
  const std::string map{std::istreambuf_iterator<char>(file), {}};
  const std::regex quoted("`([^`]*)`");
  int paths = 0;
  for (std::sregex_iterator at(map.begin(), map.end(), quoted), end; at != end; ++at, ++paths) {
    EXPECT_TRUE(std::filesystem::exists(kRoot / (*at)[1].str())) << (*at)[1];
  }
  EXPECT_GT(paths, 50);
}

TEST(Documents, EveryFolderOfSourcesIsOnTheMap) {
  std::ifstream file(kRoot / "docs/MAP.md");
  const std::string map{std::istreambuf_iterator<char>(file), {}};
  for (const auto& folder : std::filesystem::directory_iterator(kRoot / "src")) {
    EXPECT_NE(map.find("src/" + folder.path().filename().string()), std::string::npos) << folder.path();
  }
}

}  // namespace
}  // namespace lockstep

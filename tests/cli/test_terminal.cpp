// What a terminal shows, through a pseudo-terminal.
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "support/fixtures.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// lockstep in a terminal of its own, with a home of its own.
class Terminal {
 public:
  Terminal(std::vector<std::string> arguments, const std::string& locale) {
    fs::create_directories(home_);
    pid_ = ::forkpty(&fd_, nullptr, nullptr, nullptr);
    if (pid_ != 0) return;
    ::setenv("LC_ALL", locale.c_str(), 1);
    ::setenv("XDG_CACHE_HOME", home_.c_str(), 1);
    arguments.insert(arguments.begin(), LOCKSTEP_BINARY);
    std::vector<char*> argv;
    for (std::string& each : arguments) argv.push_back(each.data());
    argv.push_back(nullptr);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ~Terminal() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    ::close(fd_);
    std::error_code ignored;
    fs::remove_all(home_, ignored);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  bool open() const { return pid_ > 0; }  // false: there are no pseudo-terminals here

  // What is shown next, up to the end of `text`; or all there is, if that does not come.
  std::string until(const std::string& text) {
    pollfd ready{fd_, POLLIN, 0};
    while (shown_.find(text) == shown_.npos && ::poll(&ready, 1, 60000) == 1) {
      char part[4096];
      const ssize_t count = ::read(fd_, part, sizeof(part));
      if (count <= 0) break;  // the other side is closed
      shown_.append(part, static_cast<size_t>(count));
    }
    const size_t at = shown_.find(text);
    const std::string next = shown_.substr(0, at == shown_.npos ? at : at + text.size());
    shown_.erase(0, next.size());
    return next;
  }
  void type(const std::string& text) { ASSERT_EQ(::write(fd_, text.data(), text.size()), std::ssize(text)); }
  int exit_status() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  fs::path home_ = fs::path(testing::TempDir()) / ("terminal-" + std::to_string(::getpid()));
  pid_t pid_ = 0;
  int fd_ = -1;
  std::string shown_;  // and not taken yet
};

std::vector<std::string> with_model(const std::string& verb) {
  return {verb, "-m", test::data_path("models/llama-text").string()};
}

TEST(Terminal, ChatTakesLettersOfEveryLanguage) {
  for (const char* locale : {"C", "C.UTF-8"}) {
    std::vector<std::string> arguments = with_model("chat");
    arguments.insert(arguments.end(), {"-n", "2"});
    Terminal terminal(arguments, locale);
    if (!terminal.open()) GTEST_SKIP();
    terminal.until("> ");  // before that the terminal itself would show what is typed
    terminal.type("Größe 日本\n");
    const std::string shown = terminal.until("[cut at -n 2]");
    EXPECT_NE(shown.find("Größe 日本"), shown.npos) << locale << ": " << shown;
    terminal.until("> ");
    terminal.type("/undo\n");
    EXPECT_NE(terminal.until("taken back.").find("The last question is taken back."), std::string::npos);
    terminal.until("> ");
    terminal.type("  /quit \n");
    terminal.until("the end");
    EXPECT_EQ(terminal.exit_status(), 0);
  }
}

TEST(Terminal, AnInterruptedReplyEndsItsLine) {
  std::vector<std::string> arguments = with_model("generate");
  arguments.insert(arguments.end(), {"-p", "one two", "-n", "2147483647", "-c", "2147483647"});
  Terminal terminal(arguments, "C");
  if (!terminal.open()) GTEST_SKIP();
  terminal.until("made for");  // a warning, of -c
  terminal.until("e");
  terminal.type("\x03");
  const std::string shown = terminal.until("| logits");
  EXPECT_NE(shown.find(" | interrupted | "), shown.npos) << shown;
  terminal.until("the end");
  EXPECT_EQ(terminal.exit_status(), 130);
}

TEST(Terminal, InterruptedJsonSaysSo) {
  std::string prompt;
  for (int i = 0; i < 3000; ++i) prompt += "one two ";
  std::vector<std::string> arguments = with_model("generate");
  arguments.insert(arguments.end(), {"--raw", "--json", "-c", "2147483647", "-p", prompt});
  Terminal terminal(arguments, "C");
  if (!terminal.open()) GTEST_SKIP();
  terminal.until("Reading the prompt [");
  terminal.type("\x03");
  const std::string shown = terminal.until("}}");
  EXPECT_NE(shown.find(R"("finish_reason":"interrupted")"), shown.npos) << shown;
  terminal.until("the end");
  EXPECT_EQ(terminal.exit_status(), 130);
}

TEST(Terminal, AnInterruptedTraceLeavesNothing) {
  const fs::path folder = fs::path(testing::TempDir()) / ("interrupted-" + std::to_string(::getpid()));
  fs::create_directories(folder);
  std::string many = "1";
  for (int i = 2; i <= 64; ++i) many += ";" + std::to_string(i);
  std::vector<std::string> arguments = with_model("trace");
  arguments.insert(arguments.end(), {"--ids", many, "--steps", "400", "-o", (folder / "out").string()});
  Terminal terminal(arguments, "C");
  if (!terminal.open()) GTEST_SKIP();
  terminal.until("Recording [");
  EXPECT_FALSE(fs::is_empty(folder));
  terminal.type("\x03");
  const std::string shown = terminal.until("the end");
  EXPECT_TRUE(shown.ends_with("\r\033[K")) << shown;  // no bar is left
  EXPECT_EQ(terminal.exit_status(), 130);
  EXPECT_TRUE(fs::is_empty(folder));
  fs::remove_all(folder);
}

}  // namespace
}  // namespace lockstep

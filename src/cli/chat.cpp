#include <histedit.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <optional>

#include "cli.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

struct Flags {
  ModelFlags model;
  GenerateFlags generate;
  std::optional<std::string> system;
};

constexpr const char* kHelp =
    "  /new            forget the conversation\n"
    "  /undo           take back the last question and its reply\n"
    "  /system TEXT    begin anew with this system message\n"
    "  /help           this list\n"
    "  /quit           leave (also Ctrl-D)\n"
    "Ctrl-C stops a reply. A line that ends in \\ goes on in the next one.\n";

std::atomic<bool> interrupted{false};
void on_interrupt(int) { interrupted = true; }

// Lines from a terminal, with editing and a history that is kept, or from a pipe.
class LineReader {
 public:
  LineReader() {
    if (isatty(STDIN_FILENO) == 0) return;
    edit_ = el_init("lockstep", stdin, stdout, stderr);
    history_ = history_init();
    history(history_, &event_, H_SETSIZE, 1000);
    history(history_, &event_, H_SETUNIQUE, 1);
    el_set(edit_, EL_PROMPT, +[](EditLine*) { return const_cast<char*>("> "); });
    el_set(edit_, EL_EDITOR, "emacs");
    el_set(edit_, EL_SIGNAL, 1);
    el_set(edit_, EL_HIST, ::history, history_);
    try {
      file_ = models_directory().parent_path() / "chat_history";
      history(history_, &event_, H_LOAD, file_.c_str());
    } catch (const Error&) {
      // Without a home directory nothing is remembered.
    }
  }
  ~LineReader() {
    if (edit_ == nullptr) return;
    std::error_code ignored;
    if (!file_.empty()) {
      std::filesystem::create_directories(file_.parent_path(), ignored);
      history(history_, &event_, H_SAVE, file_.c_str());
    }
    history_end(history_);
    el_end(edit_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  bool terminal() const { return edit_ != nullptr; }

  /// The next line, continued lines joined; none at the end of the input.
  std::optional<std::string> next() {
    std::string text;
    while (true) {
      std::string line;
      if (!read_line(line)) return std::nullopt;
      if (line.empty() || line.back() != '\\') return text + line;
      line.back() = '\n';
      text += line;
    }
  }

 private:
  bool read_line(std::string& line) {
    if (edit_ == nullptr) return static_cast<bool>(std::getline(std::cin, line));
    int count = 0;
    const char* typed = el_gets(edit_, &count);
    if (typed == nullptr && interrupted.exchange(false)) {  // meant for a reply that has just ended
      std::printf("\n");
      line.clear();
      return true;
    }
    if (typed == nullptr || count <= 0) return false;
    line.assign(typed, static_cast<size_t>(count));
    if (!line.empty() && line.back() == '\n') line.pop_back();
    if (!line.empty()) history(history_, &event_, H_ENTER, line.c_str());
    return true;
  }

  EditLine* edit_ = nullptr;
  History* history_ = nullptr;
  HistEvent event_{};
  std::filesystem::path file_;  // of the history; empty: none
};

class Conversation {
 public:
  Conversation(const Flags& flags, std::shared_ptr<const Model> model)
      : options_(flags.generate.options),
        model_(std::move(model)),
        session_(model_, flags.model.session_options()) {
    if (model_->chat_template() == nullptr) {
      throw Error(ErrorCode::unsupported,
                  "[chat] model: expected one with a chat template, got none; try lockstep generate");
    }
    if (flags.system) messages_.push_back({"system", *flags.system});
  }

  /// False: leave.
  bool command(const std::string& line) {
    if (line == "/quit" || line == "/exit") return false;
    if (line == "/new") {
      forget_after(first_turn());
    } else if (line == "/undo") {
      if (messages_.size() >= first_turn() + 2) messages_.resize(messages_.size() - 2);
    } else if (line.starts_with("/system ")) {
      messages_ = {{"system", line.substr(8)}};
    } else {
      if (line != "/help") std::printf("No command of that name: %s\n", line.c_str());
      std::fputs(kHelp, stdout);
    }
    return true;
  }

  void ask(const std::string& text) {
    messages_.push_back({"user", text});
    interrupted = false;
    try {
      const std::string prompt = model_->chat_template()->render(messages_, true);
      const auto ids = model_->tokenizer().encode(prompt, false);
      const Generation reply = generate(session_, ids, options_, [](std::string_view piece) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
        return !interrupted && std::ferror(stdout) == 0;
      });
      std::printf("\n");
      messages_.push_back({"assistant", reply.text});
    } catch (const Error& error) {
      // The question is taken back, so that the conversation can go on.
      messages_.pop_back();
      std::printf("%s%s\n", error.what(),
                  error.code() == ErrorCode::context_full ? " (/new begins anew)" : "");
    }
    std::fflush(stdout);
  }

 private:
  size_t first_turn() const { return !messages_.empty() && messages_[0].role == "system" ? 1 : 0; }
  void forget_after(size_t count) { messages_.resize(count); }

  GenerateOptions options_;
  std::shared_ptr<const Model> model_;
  Session session_;
  std::vector<Message> messages_;
};

void run(const Flags& flags) {
  Conversation conversation(flags, flags.model.load());
  LineReader reader;
  if (reader.terminal()) std::printf("/help lists the commands.\n");
  std::signal(SIGINT, on_interrupt);
  while (const auto line = reader.next()) {
    if (line->empty()) continue;
    if (line->front() != '/') {
      conversation.ask(*line);
    } else if (!conversation.command(*line)) {
      break;
    }
  }
  if (reader.terminal()) std::printf("\n");
}

}  // namespace

void declare_chat(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  flags->generate.options.max_tokens = 1024;
  CLI::App* verb =
      app.add_subcommand("chat", "Talk with a model; the conversation so far is not computed again");
  flags->model.declare(*verb);
  verb->add_option("--system", flags->system, "a system message")->type_name("TEXT");
  flags->generate.declare(*verb);
  verb->footer(std::string("Commands in a conversation:\n") + kHelp +
               "Examples:\n  lockstep chat\n  lockstep chat --system 'Answer in French.' --temp 0.7");
  verb->callback([flags] { run(*flags); });
}

}  // namespace lockstep::cli

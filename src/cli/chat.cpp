#include <histedit.h>
#include <langinfo.h>
#include <unistd.h>

#include <clocale>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string_view>

#include "cli.h"
#include "errors.h"
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
    "  /new            forget the conversation (also /clear)\n"
    "  /undo           take back the last question and its reply\n"
    "  /system TEXT    begin anew with this system message\n"
    "  /help           this list\n"
    "  /quit           leave (also /exit, Ctrl-D)\n"
    "Ctrl-C stops a reply. A line that ends in \\ goes on in the next one.\n";

// Line editing takes letters as the locale has them, and drops what it has not. Where it has ASCII alone the
// terminal still sends UTF-8.
void speak_utf8() {
  std::setlocale(LC_CTYPE, "");
  if (std::string_view(nl_langinfo(CODESET)) != "UTF-8") std::setlocale(LC_CTYPE, "C.UTF-8");
}

std::string trimmed(const std::string& text) {
  constexpr const char* kSpace = " \t\r";
  const size_t first = text.find_first_not_of(kSpace);
  return first == text.npos ? "" : text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// Lines from a terminal, with editing and a history that is kept, or from a pipe.
class LineReader {
 public:
  LineReader() {
    if (isatty(STDIN_FILENO) == 0) return;
    speak_utf8();
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
      file_.clear();  // without a home directory nothing is remembered
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

  /// The next line, continued lines joined, also where the input ends; none at its end.
  std::optional<std::string> next() {
    std::string text;
    while (true) {
      std::string line;
      if (!read_line(line)) return text.empty() ? std::nullopt : std::optional(text);
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
    if (typed == nullptr && take_interrupt()) {  // meant for a reply that has just ended
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
    options_.on_prompt = show_prompt;
    if (model_->chat_template() == nullptr) {
      throw Error(ErrorCode::unsupported,
                  "[chat] model: expected one with a chat template, got none; try lockstep generate");
    }
    if (flags.system) messages_.push_back({"system", *flags.system});
  }

  /// False: leave.
  bool command(const std::string& line) {
    if (line == "/quit" || line == "/exit") return false;
    if (line == "/new" || line == "/clear") {
      messages_.resize(first_turn());
      std::printf("The conversation is forgotten.\n");
    } else if (line == "/undo") {
      const bool any = messages_.size() >= first_turn() + 2;
      if (any) messages_.resize(messages_.size() - 2);
      std::printf(any ? "The last question is taken back.\n" : "There is no question to take back.\n");
    } else if (line == "/system") {
      std::printf("/system: expected a message after it, got none\n");
    } else if (line.starts_with("/system ")) {
      messages_ = {{"system", line.substr(8)}};
      std::printf("The conversation begins anew.\n");
    } else {
      if (line != "/help") std::printf("No command of that name: %s\n", line.c_str());
      std::fputs(kHelp, stdout);
    }
    return true;
  }

  /// Says so and returns false if it could not be answered: then it is taken back, and the conversation goes
  /// on.
  bool ask(const std::string& text) {
    messages_.push_back({"user", text});
    take_interrupt();
    try {
      const std::string prompt = model_->chat_template()->render(messages_, true);
      const auto ids = model_->tokenizer().encode(prompt, false);
      const Generation reply = generate(session_, ids, options_, [](std::string_view piece) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
        return !interrupted() && std::ferror(stdout) == 0;
      });
      hide_progress();
      std::printf("\n");
      if (const std::string why = cut_short(reply, options_); !why.empty())
        std::printf("[%s]\n", why.c_str());
      if (reply.ids.empty() && interrupted())
        messages_.pop_back();  // while it was read: as if it had not been asked
      else
        messages_.push_back({"assistant", reply.text});
    } catch (const Error& error) {
      messages_.pop_back();
      print_error(std::string(error.what()) +
                  (error.code() == ErrorCode::context_full ? "; /new begins anew" : ""));
      return false;
    }
    std::fflush(stdout);
    return true;
  }

 private:
  size_t first_turn() const { return !messages_.empty() && messages_[0].role == "system" ? 1 : 0; }

  GenerateOptions options_;
  std::shared_ptr<const Model> model_;
  Session session_;
  std::vector<Message> messages_;
};

void run(const Flags& flags) {
  Conversation conversation(flags, flags.model.load());
  LineReader reader;
  if (reader.terminal()) std::printf("/help lists the commands.\n");
  catch_interrupts(false);
  bool answered = true;
  while (const auto typed = reader.next()) {
    const std::string line = trimmed(*typed);
    if (line.empty()) continue;
    if (line.front() != '/') {
      answered = conversation.ask(line) && answered;
    } else if (!conversation.command(line)) {
      break;
    }
  }
  if (reader.terminal())
    std::printf("\n");
  else if (!answered)
    throw CLI::RuntimeError(kWrongInput);
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

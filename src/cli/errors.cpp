#include "errors.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

namespace lockstep::cli {
namespace {

// "Exactly 1 option from [LIST] is required( and N were given)" of CLI11.
constexpr std::string_view kChoice = "Exactly 1 option from [";
constexpr std::string_view kRequired = " is required";

std::string choice_message(const std::string& text) {
  const size_t end = text.find(']');
  const size_t count = text.find("and ");
  const std::string got =
      count == text.npos ? "none" : text.substr(count + 4, text.find(' ', count + 4) - count - 4);
  return "input: expected exactly one of " + text.substr(kChoice.size(), end - kChoice.size()) + ", got " +
         got;
}

// The first argument that no flag took; one that looks like a flag says more than a word that may belong to
// it.
std::string left_over(const CLI::App& app) {
  const std::vector<std::string> rest = app.remaining(true);
  for (const std::string& each : rest) {
    if (each.size() > 1 && each[0] == '-') return each.substr(0, each.find('='));
  }
  return rest.empty() ? "" : rest[0];
}

std::string what_is_wrong(const CLI::App& app, const CLI::ParseError& error) {
  std::string text = error.what();
  const std::string rest = left_over(app);
  if (!rest.empty() && rest[0] == '-') return rest + ": expected a flag of this verb, got another";
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    return "arguments: expected no more, got \"" + rest + "\"";
  }
  if (text.starts_with(kChoice)) return choice_message(text);
  if (text.ends_with(kRequired))
    return text.substr(0, text.size() - kRequired.size()) + ": expected a value, got none";
  if (const size_t at = text.find(": 1 required"); at != text.npos) {
    return text.substr(0, at) + ": expected a value after it, got none";
  }
  if (const size_t at = text.find(": At Most 1 required but received "); at != text.npos) {
    return text.substr(0, at) + ": expected it once, got it" + text.substr(text.rfind(' ')) + " times";
  }
  return text;
}

}  // namespace

std::string usage_message(const CLI::App& app, const CLI::ParseError& error) {
  const auto verbs = app.get_subcommands();
  if (verbs.empty() && left_over(app).empty()) {
    return "[lockstep] verb: expected one, got none (see lockstep --help)";
  }
  const std::string verb = verbs.empty() ? "" : verbs[0]->get_name();
  return "[" + (verb.empty() ? "lockstep" : verb) + "] " + what_is_wrong(app, error) + " (see lockstep " +
         verb + (verb.empty() ? "" : " ") + "--help)";
}

void print_error(std::string_view message) {
  constexpr size_t kLongest = 2000;
  std::string line(message.substr(0, kLongest));
  if (line.size() < message.size()) line += "...";
  // A name may hold anything, such as a line's end or what a terminal takes for a command.
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  std::fprintf(stderr, "lockstep: %s\n", line.c_str());
}

bool finish_output() {
  const bool lost = std::ferror(stdout) != 0;
  if (std::fflush(stdout) == 0 && !lost) return true;
  print_error(std::string("[stdout] write: ") +
              (lost ? "expected room for all of the output, got less" : std::strerror(errno)));
  std::clearerr(stdout);  // said once
  return false;
}

}  // namespace lockstep::cli

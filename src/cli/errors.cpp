#include "errors.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#include "cli.h"

namespace lockstep::cli {
namespace {

// "Exactly 1 option from [LIST] is required( and N were given)" of CLI11.
constexpr std::string_view kChoice = "Exactly 1 option from [";
constexpr std::string_view kRequired = " is required";
// "Requires at most 1 options be given from [LIST]"
constexpr std::string_view kAtMostOne = "Requires at most 1 options be given from [";

// How many of the choices of a verb were made.
int64_t chosen(const CLI::App& verb) {
  int64_t count = 0;
  for (const CLI::App* group : verb.get_subcommands([](const CLI::App*) { return true; })) {
    for (const CLI::Option* option : group->get_options()) count += option->count() > 0 ? 1 : 0;
  }
  return count;
}

// Letters to add, drop or replace until one word is the other.
size_t distance(std::string_view one, std::string_view other) {
  std::vector<size_t> row(other.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < one.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < other.size(); ++j) {
      const size_t replaced = diagonal + (one[i] == other[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

// What other tools call some flags and verbs.
constexpr std::pair<std::string_view, std::string_view> kElsewhere[] = {
    {"--n-predict", "--max-tokens"},
    {"--predict", "--max-tokens"},
    {"--max-new-tokens", "--max-tokens"},
    {"--temperature", "--temp"},
    {"--ctx-size", "--context"},
    {"--n-ctx", "--context"},
    {"--file", "--prompt-file"},
    {"--system-prompt", "--system"},
    {"--repetition-penalty", "--repeat-penalty"},
    {"--cache-type-k", "--kv-type"},
    {"--cache-type-v", "--kv-type"},
    {"--random-seed", "--seed"},
    {"--hf-repo", "--model"},
    {"-hf", "--model"},
    {"-s", "--seed"},
    {"-f", "--prompt-file"},
    {"-sys", "--system"},
    {"-no-cnv", "--raw"},
    {"--no-conversation", "--raw"},
    {"--ignore-chat-template", "--raw"},
    {"-r", "--stop"},
    {"--reverse-prompt", "--stop"},
    {"-ctk", "--kv-type"},
    {"-ctv", "--kv-type"},
    {"--max-kv-size", "--context"},
    {"run", "generate"},
    {"complete", "generate"},
    {"download", "pull"},
    {"show", "inspect"},
    {"benchmark", "bench"},
};

// "; did you mean X?" if one of them is near, or is what another tool calls so.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& names) {
  constexpr size_t kNear = 2;
  std::string nearest;
  for (const auto& [elsewhere, here] : kElsewhere) {
    if (word == elsewhere && std::find(names.begin(), names.end(), here) != names.end()) nearest = here;
  }
  if (!nearest.empty()) return "; here it is " + nearest;
  if (word.starts_with("-ngl") || word == "--gpu-layers" || word == "--n-gpu-layers")
    return "; all layers are computed by the processor";
  if (word == "-cnv" || word == "-i" || word == "--interactive" || word == "--conversation")
    return "; lockstep chat is for that";
  size_t least =
      std::min(kNear + 1, std::max<size_t>(word.size(), 1) - 1);  // of "-z" nobody knows what was meant
  for (const std::string& name : names) {
    const size_t far = distance(word, name);
    if (far < least) {
      least = far;
      nearest = name;
    }
  }
  return nearest.empty() ? "" : "; did you mean " + nearest + "?";
}

// The long flags of a verb, those of its groups included.
std::vector<std::string> flags_of(const CLI::App& verb) {
  std::vector<std::string> names;
  const auto add = [&](const CLI::App& app) {
    for (const CLI::Option* option : app.get_options()) {
      for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    }
  };
  add(verb);
  for (const CLI::App* group : verb.get_subcommands([](const CLI::App*) { return true; })) {
    if (group->get_name().empty()) add(*group);
  }
  return names;
}

std::string choice_message(const std::string& text) {
  const size_t end = text.find(']');
  const size_t count = text.find("and ");
  const std::string got =
      count == text.npos ? "none" : text.substr(count + 4, text.find(' ', count + 4) - count - 4);
  std::string choice = text.substr(kChoice.size(), end - kChoice.size());
  if (choice.ends_with(",source")) choice.replace(choice.size() - 6, 6, "- (standard input)");
  return "input: expected exactly one of " + choice + ", got " + got;
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

bool is_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }

// The argument that CLI11 took apart: -ngl, whose letters behind the first were the value of `text`'s flag
// that is wrong; or -hf, of which -f was left over. Empty: there is none.
std::string taken_apart(const std::vector<std::string>& arguments, const CLI::App& verb,
                        const std::string& text, const std::string& rest) {
  const CLI::Option* wrong = verb.get_option_no_throw(text.substr(0, text.find(':')));
  for (const std::string& each : arguments) {
    if (each.size() < 3 || each[0] != '-' || !is_letter(each[1]) || !is_letter(each[2])) continue;
    const std::string behind = each.substr(2);
    if (wrong != nullptr && wrong->check_sname(each.substr(1, 1)) && text.ends_with("got \"" + behind + "\""))
      return each;
    if (each[1] == 'h' && rest == "-" + behind && std::ranges::find(arguments, rest) == arguments.end())
      return each;
  }
  return {};
}

std::string what_is_wrong(const CLI::App& app, const std::vector<std::string>& arguments,
                          const CLI::ParseError& error) {
  const auto verbs = app.get_subcommands();
  const CLI::App& verb = verbs.empty() ? app : *verbs[0];
  std::string text = error.what();
  const std::string left = left_over(app);
  const std::string whole = taken_apart(arguments, verb, text, left);
  const std::string rest = whole.empty() ? left : whole;
  if (!rest.empty() && rest[0] == '-')
    return rest + ": expected a flag of this verb, got another" + did_you_mean(rest, flags_of(verb));
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const std::vector<std::string> flags = flags_of(verb);
    const bool by_flag = std::ranges::find(flags, "--model") != flags.end() &&
                         std::ranges::none_of(verb.get_options(), &CLI::Option::get_positional);
    return "arguments: expected no more, got \"" + rest + "\"" + (by_flag ? "; a model follows -m" : "");
  }
  if (text.starts_with(kChoice)) return choice_message(text);
  if (text.starts_with(kAtMostOne)) {
    return "input: expected at most one of " +
           text.substr(kAtMostOne.size(), text.find(']') - kAtMostOne.size()) + ", got " +
           std::to_string(chosen(verb));
  }
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

std::string usage_message(const CLI::App& app, const std::vector<std::string>& arguments,
                          const CLI::ParseError& error) {
  const auto verbs = app.get_subcommands();
  if (verbs.empty() && left_over(app).empty()) {
    return "[lockstep] verb: expected one, got none (see lockstep --help)";
  }
  const std::string verb = verbs.empty() ? "" : verbs[0]->get_name();
  return "[" + (verb.empty() ? "lockstep" : verb) + "] " + what_is_wrong(app, arguments, error) +
         " (see lockstep " + verb + (verb.empty() ? "" : " ") + "--help)";
}

std::string mistaken_help(const std::vector<std::string>& arguments) {
  for (const std::string& each : arguments) {
    if (each == "-h" || each == "--help") return {};
  }
  for (const std::string& each : arguments) {
    if (each.size() > 2 && each.starts_with("-h"))
      return "[lockstep] " + each + ": expected a flag of lockstep, got another" +
             did_you_mean(each, {"--model"}) + " (see lockstep --help)";
  }
  return {};
}

std::string unknown_verb(const CLI::App& app, const std::string& word) {
  std::vector<std::string> names = {"help"};
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(verb->get_name());
  return "[lockstep] verb: expected one that it has, got \"" + word + "\"" + did_you_mean(word, names) +
         " (see lockstep --help)";
}

std::string printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text;
}

void print_error(std::string_view message) {
  constexpr size_t kLongest = 2000;
  std::string line(message.substr(0, kLongest));
  if (line.size() < message.size()) line += "...";
  hide_progress();
  std::fprintf(stderr, "lockstep: %s\n", printable(std::move(line)).c_str());
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

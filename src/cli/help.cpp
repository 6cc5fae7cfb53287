// How --help reads: 80 columns, and options of which one is taken under what they are for.
#include <algorithm>
#include <sstream>
#include <string_view>

#include "cli.h"

namespace lockstep::cli {
namespace {

constexpr size_t kColumns = 80;
constexpr size_t kNames = 34;  // columns of names, before what is said of them

// Broken between words; a word that is longer stays whole.
std::string wrapped(std::string_view text, size_t columns) {
  std::string out;
  size_t line = 0;  // columns taken of the last line
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    if (line > 0) out += line + 1 + end > columns ? '\n' : ' ';
    line = line > 0 && line + 1 + end <= columns ? line + 1 + end : end;
    out += text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return out;
}

class Columns : public CLI::Formatter {
 public:
  Columns() { column_width(kNames); }

  std::string make_description(const CLI::App* app) const override {
    return wrapped(app->get_description(), kColumns) + "\n";
  }
  // What kind of value, without the range, which the message about a wrong one names.
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_type_size() == 0) return {};
    const std::string type = option->get_type_name();
    std::string out = " " + type.substr(0, type.find(':'));
    if (option->get_expected_max() == CLI::detail::expected_max_vector_size) out += " ...";
    if (option->get_required() && option->nonpositional()) out += " (required)";
    return out;
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    std::string text = option->get_description();
    if (!option->get_default_str().empty()) text += "; default: " + option->get_default_str();
    return wrapped(text, kColumns - kNames);
  }
  std::string make_subcommand(const CLI::App* verb) const override {
    std::ostringstream out;
    CLI::detail::format_help(out, verb->get_name(), wrapped(verb->get_description(), kColumns - kNames),
                             kNames);
    return out.str();
  }
  std::string make_expanded(const CLI::App* group) const override {
    std::string out = "\n" + group->get_description() + ":\n";
    for (const CLI::Option* option : group->get_options()) {
      if (option != group->get_help_ptr()) out += make_option(option, option->get_positional());
    }
    return out;
  }
  // Lines of a list or an example begin with two spaces and stay as they are.
  std::string make_footer(const CLI::App* app) const override {
    std::istringstream footer(app->get_footer());
    std::string out;
    for (std::string line; std::getline(footer, line);)
      out += (line.starts_with("  ") ? line : wrapped(line, kColumns)) + "\n";
    return out;
  }
};

}  // namespace

std::shared_ptr<CLI::FormatterBase> help_formatter() { return std::make_shared<Columns>(); }

}  // namespace lockstep::cli

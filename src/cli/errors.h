// What is said about wrong usage and wrong input: one line each.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "lockstep/error.h"

namespace lockstep::cli {

// Exit statuses beside 0; those of verdicts are in verdict.h.
inline constexpr int kWrongInput = 1;
inline constexpr int kUsage = 3;
inline constexpr int kInterrupted = 130;  // as a shell says of SIGINT

/// The whole of `text` as a number; integers are decimal, whatever zeros they begin with.
template <typename T>
bool parse_number(std::string_view text, T& value) {
  if constexpr (std::is_integral_v<T>) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size();
  } else {
    return CLI::detail::lexical_cast(std::string(text), value);
  }
}

/// A number of `low` to `high`; `expected` says so in words where the numbers would not.
template <typename T>
CLI::Validator in_range(T low, T high, std::string expected = {}) {
  if (expected.empty()) expected = std::to_string(low) + " to " + std::to_string(high);
  const auto check = [=](std::string& text) -> std::string {
    T value{};
    if (!parse_number(text, value) || !(value >= low && value <= high))  // NaN too
      return "expected " + expected + ", got \"" + text + "\"";
    if constexpr (std::is_integral_v<T>) text = std::to_string(value);  // CLI11 takes 010 for 8
    return {};
  };
  return {check, expected};
}

/// Not the empty text that an unset variable of a shell leaves.
inline CLI::Validator not_empty(const std::string& expected) {
  return {[=](const std::string& text) { return text.empty() ? "expected " + expected + ", got \"\"" : ""; },
          ""};
}

/// A value that `parse` takes; where it throws, its message says what was expected.
template <typename Parse>
CLI::Validator taken_by(Parse parse) {
  const auto check = [=](const std::string& text) -> std::string {
    try {
      parse(text);
      return {};
    } catch (const Error& error) {
      const std::string_view message = error.what();
      return std::string(message.substr(std::min(message.find("expected "), message.size())));
    }
  };
  return {check, ""};
}

/// `[verb] what: expected ..., got ...` for what CLI11 found wrong with the arguments of `app`.
std::string usage_message(const CLI::App& app, const std::vector<std::string>& arguments,
                          const CLI::ParseError& error);

/// The same for an argument such as -hf, of which CLI11 took -h for a call for help; empty: it was one.
std::string mistaken_help(const std::vector<std::string>& arguments);

/// The same for a word that is no verb, with the one that is nearly it.
std::string unknown_verb(const CLI::App& app, const std::string& word);

/// A name from a file with "?" for what ends a line or a terminal takes for a command.
std::string printable(std::string text);

/// Prints "lockstep: " and the message as one line on stderr, whatever names from files and arguments it
/// quotes.
void print_error(std::string_view message);

/// Writes what stdout still holds. False, and said, if anything written to it was lost.
bool finish_output();

}  // namespace lockstep::cli

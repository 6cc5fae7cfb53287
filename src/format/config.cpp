#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "format/json.h"
#include "lockstep/checkpoint.h"
#include "tensor/fail.h"

namespace lockstep {

using Json = nlohmann::json;

struct Config::State {
  Json object;
  std::string where;
  mutable std::set<std::string, std::less<>> read;
  mutable std::map<std::string, std::unique_ptr<Config>, std::less<>> nested;

  // nullptr if absent or null; marks the key read.
  const Json* find(std::string_view key) const {
    read.emplace(key);
    const auto it = object.find(key);
    return it == object.end() || it->is_null() ? nullptr : &*it;
  }

  [[noreturn]] void wrong_type(std::string_view key, const char* expected, const Json& value) const {
    std::string got = value.dump();
    if (got.size() > 40) got = got.substr(0, 40) + "...";
    fail(ErrorCode::format, "[{}] {}: expected {}, got {}", where, key, expected, got);
  }

  const Json& need(std::string_view key, const Json* value) const {
    if (value == nullptr) fail(ErrorCode::format, "[{}] {}: expected a value, got none", where, key);
    return *value;
  }

  int64_t to_integer(std::string_view key, const Json& value) const {
    if (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX) wrong_type(key, "an integer", value);
    if (value.is_number_integer()) return value.get<int64_t>();
    if (value.is_number_float()) {
      const double number = value.get<double>();
      if (number == std::floor(number) && std::fabs(number) < 0x1p62) return static_cast<int64_t>(number);
    }
    wrong_type(key, "an integer", value);
  }

  double to_number(std::string_view key, const Json& value) const {
    if (!value.is_number()) wrong_type(key, "a number", value);
    return value.get<double>();
  }
};

Config::Config(std::string_view text, std::string where) : state_(std::make_unique<State>()) {
  state_->where = std::move(where);
  state_->object = parse_json(text, state_->where);
  if (!state_->object.is_object()) {
    fail(ErrorCode::format, "[{}] JSON: expected an object, got {}", state_->where,
         state_->object.type_name());
  }
}
Config::~Config() = default;
Config::Config(Config&&) noexcept = default;
Config& Config::operator=(Config&&) noexcept = default;

bool Config::has(std::string_view key) const {
  const auto it = state_->object.find(key);
  return it != state_->object.end() && !it->is_null();
}

bool Config::is_null(std::string_view key) const {
  const auto it = state_->object.find(key);
  return it != state_->object.end() && it->is_null();
}

int64_t Config::integer(std::string_view key, std::optional<int64_t> fallback) const {
  const Json* value = state_->find(key);
  if (value == nullptr && fallback) return *fallback;
  return state_->to_integer(key, state_->need(key, value));
}

double Config::number(std::string_view key, std::optional<double> fallback) const {
  const Json* value = state_->find(key);
  if (value == nullptr && fallback) return *fallback;
  return state_->to_number(key, state_->need(key, value));
}

bool Config::boolean(std::string_view key, std::optional<bool> fallback) const {
  const Json* value = state_->find(key);
  if (value == nullptr && fallback) return *fallback;
  if (!state_->need(key, value).is_boolean()) state_->wrong_type(key, "true or false", *value);
  return value->get<bool>();
}

std::string Config::text(std::string_view key, std::optional<std::string> fallback) const {
  const Json* value = state_->find(key);
  if (value == nullptr && fallback) return *fallback;
  if (!state_->need(key, value).is_string()) state_->wrong_type(key, "a string", *value);
  return value->get<std::string>();
}

std::vector<int64_t> Config::integers(std::string_view key) const {
  const Json* value = state_->find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return {state_->to_integer(key, *value)};
  std::vector<int64_t> list;
  for (const Json& each : *value) list.push_back(state_->to_integer(key, each));
  return list;
}

std::vector<std::string> Config::texts(std::string_view key) const {
  const Json* value = state_->find(key);
  if (value == nullptr) return {};
  std::vector<std::string> list;
  const Json all = value->is_array() ? *value : Json::array({*value});
  for (const Json& each : all) {
    if (!each.is_string()) state_->wrong_type(key, "strings", *value);
    list.push_back(each.get<std::string>());
  }
  return list;
}

const Config* Config::object(std::string_view key) const {
  const Json* value = state_->find(key);
  if (value == nullptr) return nullptr;
  if (!value->is_object()) state_->wrong_type(key, "an object", *value);
  auto& nested = state_->nested[std::string(key)];
  if (!nested) nested = std::make_unique<Config>(value->dump(), state_->where + ": " + std::string(key));
  return nested.get();
}

void Config::ignore(std::string_view key) const { state_->read.emplace(key); }

std::vector<std::string> Config::unread() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : state_->object.items()) {
    if (value.is_null()) continue;
    if (!state_->read.contains(key)) keys.push_back(key);
    if (const auto it = state_->nested.find(key); it != state_->nested.end()) {
      for (const std::string& inner : it->second->unread()) keys.push_back(key + "." + inner);
    }
  }
  return keys;
}

std::string Config::json() const { return state_->object.dump(2); }
const std::string& Config::where() const { return state_->where; }

}  // namespace lockstep

#include "configs/schema_values.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>

#include "configs/path_text.h"

namespace upmoe {
namespace {

constexpr double kExactIntegers = 9007199254740992.0;  // 2^53: whole doubles beyond are not exact

std::string shown(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull:
      return "nothing";
    case YamlNode::Kind::kList:
      return "a list";
    case YamlNode::Kind::kMap:
      return "a map of keys";
    case YamlNode::Kind::kScalar:
      break;
  }
  constexpr std::size_t kLongest = 60;
  const std::string text = node.text.size() > kLongest ? node.text.substr(0, kLongest) + "..." : node.text;
  return node.quoted ? fmt::format("the text \"{}\"", text) : fmt::format("'{}'", text);
}

void expected(const YamlNode& node, const std::string& key, const std::string& what, Problems& problems) {
  problems.add(node.where, fmt::format("{}: found {}, expected {}", key, shown(node), what));
}

// The digits without sign; empty when the text has a leading zero that YAML 1.1 would read as octal.
bool is_octal_looking(std::string_view digits) {
  return digits.size() > 1 && digits[0] == '0' && digits[1] >= '0' && digits[1] <= '9';
}

std::string_view without_sign(std::string_view text) {
  return !text.empty() && (text[0] == '+' || text[0] == '-') ? text.substr(1) : text;
}

// A finite decimal number, nothing else: no hexadecimal, no underscores, no inf or nan.
std::optional<double> parse_double(std::string_view text) {
  const std::string_view digits = without_sign(text);
  if (digits.empty() || !((digits[0] >= '0' && digits[0] <= '9') || digits[0] == '.')) return std::nullopt;
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{} || end != digits.data() + digits.size() || !std::isfinite(value))
    return std::nullopt;
  return text[0] == '-' ? -value : value;
}

// Whole numbers; 1e4 counts, since it is exact, 1.5 and 300.0 do not.
std::optional<std::int64_t> parse_integer(std::string_view text) {
  const std::string_view unsigned_text = without_sign(text);
  if (unsigned_text.empty() || unsigned_text[0] == '+' || unsigned_text[0] == '-') return std::nullopt;
  const std::string_view digits = text[0] == '+' ? unsigned_text : text;
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error == std::errc{} && end == digits.data() + digits.size()) return value;
  // Not digits alone: 1e4 may still be a whole number, read as a double where that is exact.
  if (text.find_first_of("eE") == std::string_view::npos) return std::nullopt;
  const std::optional<double> real = parse_double(text);
  if (!real || *real != std::floor(*real) || std::abs(*real) > kExactIntegers) return std::nullopt;
  return static_cast<std::int64_t>(*real);
}

}  // namespace

std::string range_words(const NumberCheck& check) {
  const bool low = std::isfinite(check.least), high = std::isfinite(check.most);
  if (low && high && !check.above && !check.below) return fmt::format("{} to {}", check.least, check.most);
  std::string words;
  if (low) words = fmt::format("{} {}", check.above ? "above" : "at least", check.least);
  if (high) {
    words += fmt::format("{}{} {}", low ? " and " : "", check.below ? "below" : "at most", check.most);
  }
  return words;
}

bool check_number(double value, const YamlNode& node, const std::string& key, const NumberCheck& check,
                  Problems& problems) {
  const bool low = check.above ? value > check.least : value >= check.least;
  const bool high = check.below ? value < check.most : value <= check.most;
  if (!low || !high) {
    problems.add(node.where, fmt::format("{}: found {}, expected {}", key, node.text, range_words(check)));
    return false;
  }
  for (double built : check.built) {
    if (value == built) return true;
  }
  if (check.built.empty()) return true;
  problems.add(node.where, fmt::format("{}: {} is not built yet; use {}", key, node.text,
                                       fmt::join(check.built, " or ")));
  return false;
}

std::optional<std::int64_t> integer_of(const YamlNode& node, const std::string& key, const NumberCheck& check,
                                       Problems& problems) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted) {
    expected(node, key, "a whole number", problems);
    return std::nullopt;
  }
  if (is_octal_looking(without_sign(node.text))) {
    expected(node, key, "a whole number without leading zeros (YAML reads them as octal)", problems);
    return std::nullopt;
  }
  const std::optional<std::int64_t> value = parse_integer(node.text);
  if (!value) {
    expected(node, key, "a whole number", problems);
    return std::nullopt;
  }
  if (!check_number(static_cast<double>(*value), node, key, check, problems)) return std::nullopt;
  return value;
}

std::optional<double> number_of(const YamlNode& node, const std::string& key, const NumberCheck& check,
                                Problems& problems) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted) {
    expected(node, key, "a number", problems);
    return std::nullopt;
  }
  if (is_octal_looking(without_sign(node.text))) {
    expected(node, key, "a number without leading zeros", problems);
    return std::nullopt;
  }
  const std::optional<double> value = parse_double(node.text);
  if (!value) {
    expected(node, key, "a finite number", problems);
    return std::nullopt;
  }
  if (!check_number(*value, node, key, check, problems)) return std::nullopt;
  return value;
}

std::optional<bool> truth_of(const YamlNode& node, const std::string& key, Problems& problems) {
  if (node.kind == YamlNode::Kind::kScalar && !node.quoted) {
    if (node.text == "true") return true;
    if (node.text == "false") return false;
  }
  expected(node, key, "true or false", problems);
  return std::nullopt;
}

namespace {

// False for a scalar that is no text at all, and says so.
bool has_text(const YamlNode& node, const std::string& key, bool may_be_empty, Problems& problems) {
  if (node.text.empty() && !may_be_empty) {
    problems.add(node.where, key + ": is empty");
    return false;
  }
  if (node.text.find('\0') != std::string::npos) {
    problems.add(node.where, key + ": holds a NUL character");
    return false;
  }
  return true;
}

}  // namespace

std::optional<std::string> text_of(const YamlNode& node, const std::string& key, const TextCheck& check,
                                   Problems& problems) {
  if (node.kind != YamlNode::Kind::kScalar) {
    expected(node, key, "a text", problems);
    return std::nullopt;
  }
  if (!has_text(node, key, check.may_be_empty, problems)) return std::nullopt;
  if (!check.path || node.text.empty()) return node.text;
  PathText expanded = expand_path(node.text);
  if (expanded.problem.empty()) return std::move(expanded.path);
  problems.add(node.where, fmt::format("{}: {}", key, expanded.problem));
  return std::nullopt;
}

std::optional<std::size_t> choice_of(const YamlNode& node, const std::string& key, const NameList& names,
                                     Problems& problems) {
  const bool scalar = node.kind == YamlNode::Kind::kScalar;
  if (scalar && !has_text(node, key, false, problems)) return std::nullopt;
  const auto found = std::find(names.built.begin(), names.built.end(), node.text);
  if (scalar && found != names.built.end()) return static_cast<std::size_t>(found - names.built.begin());
  if (scalar && std::find(names.planned.begin(), names.planned.end(), node.text) != names.planned.end()) {
    problems.add(node.where, fmt::format("{}: {} is not built yet; use {}", key, node.text,
                                         fmt::join(names.built, " or ")));
  } else {
    expected(node, key, fmt::format("one of {}", fmt::join(names.built, ", ")), problems);
  }
  return std::nullopt;
}

}  // namespace upmoe

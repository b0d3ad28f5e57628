#include "configs/path_text.h"

#include <fmt/format.h>

#include <cstdlib>

namespace upmoe {
namespace {

bool is_name_char(char c, bool first) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (!first && c >= '0' && c <= '9');
}

// The name behind a dollar sign at `at`, and where it ends; empty when there is none.
struct Variable {
  std::string name;
  std::size_t end = 0;
};
Variable variable_at(const std::string& text, std::size_t at) {
  const bool braces = at + 1 < text.size() && text[at + 1] == '{';
  const std::size_t begin = at + (braces ? 2 : 1);
  std::size_t end = begin;
  while (end < text.size() && is_name_char(text[end], end == begin)) ++end;
  if (end == begin || (braces && (end == text.size() || text[end] != '}'))) return {};
  return {text.substr(begin, end - begin), end + (braces ? 1 : 0)};
}

const char* value_of(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? value : nullptr;
}

}  // namespace

PathText expand_path(const std::string& written) {
  std::string path;
  std::size_t at = 0;
  if (!written.empty() && written[0] == '~') {
    if (written.size() > 1 && written[1] != '/') {
      return {"", fmt::format("'{}': only ~/ is known, your own home folder; write the folder out, or ./{} "
                              "for a name that begins with ~",
                              written, written)};
    }
    const char* home = value_of("HOME");
    if (home == nullptr) return {"", fmt::format("'{}': HOME is not set; write the folder out", written)};
    path = home;
    at = 1;
  }
  while (at < written.size()) {
    if (written[at] != '$') {
      path += written[at++];
    } else if (at + 1 < written.size() && written[at + 1] == '$') {
      path += '$';
      at += 2;
    } else {
      const Variable variable = variable_at(written, at);
      if (variable.name.empty())
        return {"", fmt::format("'{}': a $ begins the name of a variable, such as ${{HOME}}; write $$ for a "
                                "dollar sign",
                                written)};
      const char* value = value_of(variable.name.c_str());
      if (value == nullptr)
        return {"",
                fmt::format("'{}': the environment variable {} is unset or empty; write $$ for a dollar sign",
                            written, variable.name)};
      path += value;
      at = variable.end;
    }
  }
  return {path, ""};
}

std::string path_as_text(const std::string& path) {
  std::string text = !path.empty() && path[0] == '~' ? "./" : "";
  for (const char c : path) text += c == '$' ? "$$" : std::string(1, c);
  return text;
}

}  // namespace upmoe

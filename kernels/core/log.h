#pragma once
// Lines for people, on standard error: rank 0 speaks, the others only when something is wrong.

#include <fmt/core.h>

#include <string>
#include <utility>

namespace upmoe::log {

enum class Level { kInfo, kWarning };

// Before the first line; rank 0 is the default.
void start(int rank);
void write(Level level, const std::string& line);
// Not if this process has written the same line so before.
void write_once(Level level, const std::string& line);
// "2026-01-31T23:59:59+01:00 " where standard error is no terminal, as at the beginning of every line there;
// else empty. For lines that are written past this file.
std::string timestamp();

template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warning(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kWarning, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info_once(fmt::format_string<Args...> format, Args&&... args) {
  write_once(Level::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warn_once(fmt::format_string<Args...> format, Args&&... args) {
  write_once(Level::kWarning, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace upmoe::log

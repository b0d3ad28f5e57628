#pragma once
// Lines for people, on standard error: rank 0 speaks, the others only when something is wrong. With a folder,
// every rank also writes everything to a file of its own there.

#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <utility>

namespace upmoe::log {

enum class Level { kInfo, kWarning };

// Before the first line; again to add the folder. rank 0 of 1 is the default.
void start(int rank, int ranks, const std::filesystem::path& folder = {});
void write(Level level, const std::string& line);
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

}  // namespace upmoe::log

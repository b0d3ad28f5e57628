#pragma once
// Errors of the whole project: one exception type that carries an exit status, and checks that throw it.
// A message says what is wrong, where, what was found and expected, and what to do; `main` prints it once.

#include <fmt/core.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace upmoe {

// Exit statuses of the `upmoe` program; part of its interface.
enum class ExitCode : int {
  kDone = 0,
  kFailure = 1,        // unexpected failure, a bug included
  kUsage = 2,          // command line or configuration
  kBadInput = 3,       // file, checkpoint or data
  kNumeric = 4,        // non-finite loss
  kHang = 70,          // a collective did not finish
  kDevice = 71,        // GPU or driver
  kCommunicator = 72,  // dead peer
  kStopped = 75,       // stopped on request, checkpoint complete
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

// Throws Error(code, formatted message).
template <class... Args>
[[noreturn]] void fail(ExitCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

// Sentences for the end of a message, each on a line of its own: "\n  one\n  another".
std::string listed(const std::vector<std::string>& sentences);

// The message of a broken programming contract: names the source line, because the reader is a developer.
[[noreturn]] void fail_check(const char* condition, std::source_location where, const std::string& message);

}  // namespace upmoe

// A contract between pieces of this program (shapes, sizes, states). Not for user input: use fail() with words there.
#define UPMOE_CHECK(condition, ...)                                                                    \
  do {                                                                                                 \
    if (!(condition)) [[unlikely]]                                                                     \
      ::upmoe::fail_check(#condition, std::source_location::current(), ::fmt::format("" __VA_ARGS__)); \
  } while (false)

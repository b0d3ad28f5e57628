#include "kernels/core/check.h"

namespace upmoe {

void fail_check(const char* condition, std::source_location where, const std::string& message) {
  fail(ExitCode::kFailure, "internal check failed at {}:{} ({}): {}{}", where.file_name(), where.line(),
       where.function_name(), condition, message.empty() ? "" : ": " + message);
}

std::string listed(const std::vector<std::string>& sentences) {
  std::string text;
  for (const std::string& sentence : sentences) text += "\n  " + sentence;
  return text;
}

}  // namespace upmoe

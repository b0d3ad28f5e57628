#include "kernels/core/check.h"

namespace upmoe {

void fail_check(const char* condition, std::source_location where, const std::string& message) {
  fail(ExitCode::kFailure, "internal check failed at {}:{} ({}): {}{}", where.file_name(), where.line(),
       where.function_name(), condition, message.empty() ? "" : ": " + message);
}

}  // namespace upmoe

#include "launch/python.h"

#include <cstdlib>

#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;

std::string find_python() {
  if (const char* chosen = std::getenv("UPMOE_PYTHON"); chosen != nullptr && *chosen != 0) return chosen;
  const fs::path own = fs::path(UPMOE_SOURCE_DIR) / ".venv" / "bin" / "python";
  return fs::exists(own) ? own.string() : "python3";
}

fs::path script_of_source(const fs::path& name, const std::string& what) {
  fs::path script = fs::path(UPMOE_SOURCE_DIR) / name;
  if (!fs::exists(script))
    fail(ExitCode::kFailure, "{}: not found; {} needs the source folder this program was built from",
         script.string(), what);
  return script;
}

}  // namespace upmoe

#include "launch/python.h"

#include <spawn.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;

std::string find_python() {
  if (const char* chosen = std::getenv("UPMOE_PYTHON"); chosen != nullptr && *chosen != 0) return chosen;
  const fs::path own = fs::path(UPMOE_SOURCE_DIR) / ".venv" / "bin" / "python";
  return fs::exists(own) ? own.string() : "python3";
}

pid_t spawn_python(const std::vector<std::string>& arguments, const std::vector<std::pair<int, int>>& files) {
  std::vector<std::string> words{find_python()};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  int error = posix_spawn_file_actions_init(&actions);
  if (error == 0) {
    for (const auto& [own, its] : files)
      if (error == 0) error = posix_spawn_file_actions_adddup2(&actions, own, its);
    pid_t child = 0;
    if (error == 0) error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error == 0) return child;
  }
  fail(ExitCode::kFailure, "cannot start {}: {}; run launch/setup.sh, or set UPMOE_PYTHON", words[0],
       std::strerror(error));
}

fs::path script_of_source(const fs::path& name, const std::string& what) {
  fs::path script = fs::path(UPMOE_SOURCE_DIR) / name;
  if (!fs::exists(script))
    fail(ExitCode::kFailure, "{}: not found; {} needs the source folder this program was built from",
         script.string(), what);
  return script;
}

}  // namespace upmoe

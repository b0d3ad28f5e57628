#include "trainer/run_directory.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "data/checkpoint_folder.h"
#include "data/folder.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// A folder in which others' files lie side by side, where "lock" and "config.yaml" may have a meaning of their own.
std::string why_shared(const fs::path& whole) {
  static constexpr std::array kOfTheSystem{"bin",  "boot", "dev", "etc",  "home", "lib", "lib64",
                                           "proc", "root", "run", "sbin", "sys",  "usr", "var"};
  if (whole.parent_path() == whole.root_path() &&
      std::find(kOfTheSystem.begin(), kOfTheSystem.end(), whole.filename()) != kOfTheSystem.end())
    return "it is a folder of the system";
  struct stat info {};
  if (stat(whole.c_str(), &info) != 0) return {};
  constexpr mode_t kEverybodys = S_ISVTX | S_IWOTH;  // as /tmp, /var/tmp and /dev/shm are
  if ((info.st_mode & kEverybodys) == kEverybodys) return "everybody's files lie there";
  const char* home = std::getenv("HOME");
  std::error_code unknown;
  if (home != nullptr && *home != 0 && fs::equivalent(whole, home, unknown)) return "it is your home folder";
  return {};
}

// What of somebody else's lies at that place; empty when nothing does.
std::string why_not(const fs::path& dir) {
  if (dir.empty()) return "it is empty";
  fs::path whole = fs::absolute(dir).lexically_normal();
  if (whole == whole.root_path()) return "it is the root of the file system";
  if (!whole.has_filename()) whole = whole.parent_path();  // "/etc/"
  std::error_code unknown;
  const bool has_run = fs::exists(dir / "metrics.jsonl", unknown) && fs::exists(dir / "checkpoints", unknown);
  if (const std::string reason = has_run ? "" : why_shared(whole); !reason.empty()) return reason;
  if (!path_exists(dir)) return {};
  if (!fs::is_directory(dir, unknown))
    return unknown ? unknown.message() : "something that is no folder has that name";
  if (path_exists(dir / "manifest.json")) return "it is a checkpoint";
  const std::vector<fs::path> entries = entries_of(dir);
  const auto name_of = [](const fs::path& entry) { return entry.filename().string(); };
  for (const fs::path& entry : entries) {
    const std::string name = name_of(entry);
    if (name == "config.json" || name.ends_with(".safetensors") || name == "tokenizer.json")
      return fmt::format("it is a model directory (it holds {})", name);
  }
  if (std::any_of(entries.begin(), entries.end(), [&](const fs::path& e) { return step_of(name_of(e)); }))
    return "it is the folder of a run's checkpoints; give the one above it";
  return {};
}

}  // namespace

void require_run_directory(const fs::path& dir) {
  const std::string reason = why_not(dir);
  if (!reason.empty())
    fail(ExitCode::kUsage, "run.dir: '{}' is no place for a run: {}; name a folder of its own", dir.string(),
         reason);
}

void make_run_directory(const fs::path& dir) {
  require_run_directory(dir);
  make_folders(dir / "checkpoints");
}

}  // namespace upmoe

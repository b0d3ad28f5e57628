#include "trainer/run_directory.h"

#include <algorithm>

#include "data/checkpoint_folder.h"
#include "data/folder.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// What of somebody else's lies at that place; empty when nothing does.
std::string why_not(const fs::path& dir) {
  if (dir.empty()) return "it is empty";
  const fs::path whole = fs::absolute(dir).lexically_normal();
  if (whole == whole.root_path()) return "it is the root of the file system";
  if (!path_exists(dir)) return {};
  std::error_code unknown;
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

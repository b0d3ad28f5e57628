#pragma once
// Where a run may put its files.

#include <filesystem>

namespace upmoe {

// Throws Error(kUsage) for a place that is not meant for runs: no name, the root of the file system, a file,
// a model directory, a checkpoint, the checkpoints/ of a run; and, unless a run lies there already, a folder
// of the system, /tmp and its like, the user's home. Local.
void require_run_directory(const std::filesystem::path& dir);
// Then makes the folders of a run, Error(kBadInput) when they cannot be made. Local.
void make_run_directory(const std::filesystem::path& dir);

}  // namespace upmoe

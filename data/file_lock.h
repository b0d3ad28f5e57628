#pragma once
// Advisory locks on files: held by an open descriptor and gone with it, however the process ends.

#include <filesystem>
#include <optional>

namespace upmoe {

struct LockedFile {
  int fd = -1;        // the caller closes it
  bool held = false;  // false: this file system knows no locks
  bool busy = false;  // another process holds the lock; no descriptor then
};

// Opens `path`, made where there is none, and takes its lock without waiting. The lock is on the file that
// has this name when the call returns, not on one that was removed meanwhile. Nothing when the folder is not
// there; throws Error(kBadInput) for every other failure, links and things that are no files included.
std::optional<LockedFile> lock_file(const std::filesystem::path& path);

}  // namespace upmoe

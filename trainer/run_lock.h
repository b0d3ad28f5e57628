#pragma once
// One job per run directory.

#include <filesystem>

namespace upmoe {

// An advisory lock on RUN_DIR/lock, held by rank 0 for the life of the object. Throws Error(kUsage) that
// names the holder when another job has it.
class RunLock {
 public:
  explicit RunLock(const std::filesystem::path& dir);
  ~RunLock();
  RunLock(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace upmoe

#pragma once
// One job per run directory.

#include <sys/types.h>

#include <filesystem>

namespace upmoe {

// An advisory lock on RUN_DIR/lock, held by rank 0 for the life of the object. Throws Error(kUsage) that
// names the holder when another job has it.
class RunLock {
 public:
  explicit RunLock(const std::filesystem::path& dir);
  ~RunLock();
  RunLock(const RunLock&) = delete;

  // Throws what the constructor would where another job has the lock of `dir`. Makes no file, and holds the lock no
  // longer than it takes to see that it is free.
  static void require_free(const std::filesystem::path& dir);

  // Before something is written by the directory's name: throws Error(kBadInput) when that name now leads to
  // another folder, or to a lock that another job holds. A lock file that was merely removed is made again.
  void require_held();

 private:
  struct Identity {  // of a file, whatever its name is now
    dev_t device = 0;
    ino_t inode = 0;
    bool operator==(const Identity&) const = default;
  };
  static bool identify(const std::filesystem::path& path, Identity& found);  // false when it is not there
  void sign() const;

  std::filesystem::path dir_, path_;
  int fd_ = -1;
  Identity folder_, file_;
};

}  // namespace upmoe

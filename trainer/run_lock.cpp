#include "trainer/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "kernels/core/log.h"
#include "kernels/core/system_error.h"
#include "parallel/host.h"

namespace upmoe {

namespace {

constexpr mode_t kMode = 0666;  // less what umask takes: a group may share its runs

int open_lock(const std::filesystem::path& path, int flags) {
  return open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | flags, kMode);
}

// Waits for who only looks (require_free), not for a job. False with errno.
bool takes(int fd, int how) {
  constexpr int kLooks = 5;
  constexpr useconds_t kLookUs = 20'000;
  for (int waited = 0; flock(fd, how | LOCK_NB) != 0; ++waited) {
    if (errno != EWOULDBLOCK || waited == kLooks) return false;
    usleep(kLookUs);
  }
  return true;
}

// Of the lock at `path`, which could not be taken for the reason `error`; closes it.
[[noreturn]] void refuse(int fd, int error, const std::filesystem::path& path,
                         const std::filesystem::path& dir) {
  char owner[256] = {};
  const ssize_t n = pread(fd, owner, sizeof owner - 1, 0);
  close(fd);
  if (error != EWOULDBLOCK) throw SystemError(path, "locking", error);
  fail(ExitCode::kUsage,
       "{}: another job is training in this directory ({}); stop it or choose another run.dir", dir.string(),
       n > 0 ? owner : "unknown");
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& dir)
    : dir_(std::filesystem::absolute(dir)), path_(dir_ / "lock") {
  fd_ = open_lock(path_, 0);
  if (fd_ < 0) throw SystemError(path_, "opening", errno);
  if (!takes(fd_, LOCK_EX)) refuse(fd_, errno, path_, dir);
  if (!identify(dir_, folder_) || !identify(path_, file_))
    fail(ExitCode::kBadInput, "{}: vanished while it was opened; look whether another job moves it",
         path_.string());
  sign();
}

RunLock::~RunLock() {
  close(fd_);
}

void RunLock::require_free(const std::filesystem::path& dir) {
  const std::filesystem::path path = std::filesystem::absolute(dir) / "lock";
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) return;
  if (fd < 0) throw SystemError(path, "opening", errno);
  if (!takes(fd, LOCK_SH)) refuse(fd, errno, path, dir);
  close(fd);
}

bool RunLock::identify(const std::filesystem::path& path, Identity& found) {
  struct stat info {};
  if (stat(path.c_str(), &info) == 0) {
    found = {info.st_dev, info.st_ino};
    return true;
  }
  if (errno != ENOENT && errno != ENOTDIR) throw SystemError(path, "looking it up", errno);
  return false;
}

// For people and for the message of the next job.
void RunLock::sign() const {
  const std::string me = fmt::format("host {}, pid {}", host_name(), getpid());
  if (ftruncate(fd_, 0) != 0 || pwrite(fd_, me.data(), me.size(), 0) < 0)
    log::warning("{}: cannot be written: {}", path_.string(), std::strerror(errno));
}

// Asked before each save. The lock is on the open file, so it outlives its name; whether the folder is still this run's
// is told by identity (device and inode) of the folder and of the file in it:
//
//   same file there          held
//   no file, same folder     somebody cleaned up: made again, under the same lock
//   another file, or folder  another job may be at work there: nothing more is written
void RunLock::require_held() {
  Identity now;
  const bool there = identify(path_, now);
  if (there && now == file_) return;
  Identity folder;
  if (!there && identify(dir_, folder) && folder == folder_) {
    const int fresh = open_lock(path_, O_EXCL);
    if (fresh >= 0 && flock(fresh, LOCK_EX | LOCK_NB) == 0 && identify(path_, file_)) {
      close(fd_);
      fd_ = fresh;
      sign();
      log::warning("{}: was removed while this run holds it; made again", path_.string());
      return;
    }
    if (fresh >= 0) close(fresh);
  }
  fail(ExitCode::kBadInput,
       "{}: is no longer the folder that this run began in: it was moved, removed, or taken over by another "
       "job. Nothing more is written there; what this run saved lies where its folder went. Start again with "
       "a run.dir that stays",
       dir_.string());
}

}  // namespace upmoe

#include "trainer/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/log.h"

namespace upmoe {

RunLock::RunLock(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / "lock";
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (fd_ < 0) fail(ExitCode::kBadInput, "{}: cannot be opened: {}", path.string(), std::strerror(errno));
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    char owner[256] = {};
    const ssize_t n = pread(fd_, owner, sizeof owner - 1, 0);
    close(fd_);
    fail(ExitCode::kUsage,
         "{}: another job is training in this directory ({}); stop it or choose another run.dir",
         dir.string(), n > 0 ? owner : "unknown");
  }
  char host[128] = "host";
  gethostname(host, sizeof host - 1);
  const std::string me = fmt::format("host {}, pid {}", host, getpid());
  if (ftruncate(fd_, 0) != 0 || pwrite(fd_, me.data(), me.size(), 0) < 0)
    log::warning("{}: cannot be written: {}", path.string(), std::strerror(errno));
}

RunLock::~RunLock() {
  close(fd_);
}

}  // namespace upmoe

#include "data/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "kernels/core/system_error.h"

namespace upmoe {
namespace {

// False when the name leads to another file by now, or to none.
bool still_named(int fd, const std::filesystem::path& path) {
  struct stat opened {
  }, named{};
  return fstat(fd, &opened) == 0 && lstat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
         opened.st_dev == named.st_dev;
}

bool is_regular(int fd) {
  struct stat info {};
  return fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
}

}  // namespace

std::optional<LockedFile> lock_file(const std::filesystem::path& path) {
  while (true) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (fd < 0 && errno == ENOENT) return std::nullopt;
    if (fd < 0) throw SystemError(path, "creating", errno);
    if (!is_regular(fd)) {
      ::close(fd);
      fail(ExitCode::kBadInput, "{}: not a regular file; move it away", path.string());
    }
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
      if (still_named(fd, path)) return LockedFile{fd, true, false};
      ::close(fd);  // its holder has just removed it
      continue;
    }
    if (errno == EWOULDBLOCK) {
      ::close(fd);
      return LockedFile{-1, false, true};
    }
    return LockedFile{fd, false, false};
  }
}

}  // namespace upmoe

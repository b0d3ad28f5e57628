#include "kernels/core/system_error.h"

#include <cerrno>
#include <cstring>

namespace upmoe {

namespace fs = std::filesystem;

namespace {

const char* cure_of(int number) {
  switch (number) {
    case EACCES:
    case EPERM:
      return "; check the owner and the permissions, of the folders above it too";
    case EROFS:
      return "; the file system is mounted for reading only";
    case ENOSPC:
      return "; remove something, or choose another disk";
    case EDQUOT:
      return "; the quota is used up: remove something, or ask for more";
    case EFBIG:
      return "; beyond the limit of file sizes (ulimit -f, or the file system's own)";
    case EMFILE:
    case ENFILE:
      return "; raise the limit of open files (ulimit -n)";
    case ELOOP:
      return "; its links lead in a circle, or it is a link where none is followed";
    case EIO:
      return "; the disk, or the connection to it, is failing";
    case ESTALE:
      return "; the server of this file system has lost it: mount it again";
    case ENOTDIR:
      return "; something on this path is no folder";
    default:
      return "";
  }
}

}  // namespace

SystemError::SystemError(const fs::path& path, const std::string& what, int number)
    : Error(ExitCode::kBadInput,
            fmt::format("{}: {} failed: {}{}", path.string(), what, std::strerror(number), cure_of(number))),
      number_(number) {}

SystemError::SystemError(const fs::filesystem_error& e)
    : Error(ExitCode::kBadInput,
            fmt::format("{}: {}{}", e.path1().string(), e.code().message(), cure_of(e.code().value()))),
      number_(e.code().value()) {}

bool SystemError::is_missing() const {
  return number_ == ENOENT || number_ == ENOTDIR;
}

bool SystemError::is_no_space() const {
  return number_ == ENOSPC || number_ == EDQUOT || number_ == EFBIG;
}

bool SystemError::is_of_process() const {
  return number_ == EMFILE || number_ == ENFILE || number_ == ENOMEM || number_ == EAGAIN;
}

}  // namespace upmoe

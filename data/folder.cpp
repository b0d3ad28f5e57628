#include "data/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

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

[[noreturn]] void fail_system(const fs::path& path, const char* what) {
  throw SystemError(path, what, errno);
}

}  // namespace

SystemError::SystemError(const fs::path& path, const std::string& what, int number)
    : Error(ExitCode::kBadInput,
            fmt::format("{}: {} failed: {}{}", path.string(), what, std::strerror(number), cure_of(number))),
      number_(number) {}

bool SystemError::is_missing() const {
  return number_ == ENOENT || number_ == ENOTDIR;
}

bool SystemError::is_no_space() const {
  return number_ == ENOSPC || number_ == EDQUOT || number_ == EFBIG;
}

bool SystemError::is_of_process() const {
  return number_ == EMFILE || number_ == ENFILE || number_ == ENOMEM || number_ == EAGAIN;
}

bool path_exists(const fs::path& path) {
  struct stat info {};
  if (lstat(path.c_str(), &info) == 0) return true;
  if (errno != ENOENT && errno != ENOTDIR) fail_system(path, "looking it up");
  return false;
}

bool is_real_folder(const fs::path& path) {
  struct stat info {};
  if (lstat(path.c_str(), &info) == 0) return S_ISDIR(info.st_mode);
  if (errno != ENOENT && errno != ENOTDIR) fail_system(path, "looking it up");
  return false;
}

void make_folder(const fs::path& path) {
  if (mkdir(path.c_str(), 0777) != 0) fail_system(path, "making the folder");
}

void make_folders(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) throw SystemError(path, "making the folder", error.value());
}

void move_path(const fs::path& from, const fs::path& to) {
  if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) fail_system(to, "renaming to it");
  // A file system that cannot promise this: looked up first, which leaves a moment for others.
  if (path_exists(to)) throw SystemError(to, "renaming to it", EEXIST);
  if (rename(from.c_str(), to.c_str()) != 0) fail_system(to, "renaming to it");
}

void remove_file(const fs::path& path) {
  if (unlink(path.c_str()) != 0) fail_system(path, "removing");
}

void remove_empty_folder(const fs::path& path) {
  if (rmdir(path.c_str()) != 0) fail_system(path, "removing");
}

std::vector<fs::path> entries_of(const fs::path& folder) {
  std::vector<fs::path> entries;
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(opendir(folder.c_str()), closedir);
  if (!stream) {
    if (errno == ENOENT) return entries;
    fail_system(folder, "listing");
  }
  for (;;) {
    errno = 0;
    const dirent* entry = readdir(stream.get());
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") entries.push_back(folder / name);
  }
  if (errno != 0) fail_system(folder, "listing");
  std::sort(entries.begin(), entries.end());
  return entries;
}

std::uint64_t free_bytes_at(const fs::path& path) {
  struct statvfs info {};
  if (statvfs(path.c_str(), &info) != 0) fail_system(path, "asking for its free space");
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

std::uint64_t bytes_in(const fs::path& folder) {
  std::uint64_t bytes = 0;
  for (const fs::path& entry : entries_of(folder)) {
    struct stat info {};
    if (lstat(entry.c_str(), &info) != 0) fail_system(entry, "looking it up");
    if (S_ISREG(info.st_mode)) bytes += static_cast<std::uint64_t>(info.st_size);
  }
  return bytes;
}

}  // namespace upmoe

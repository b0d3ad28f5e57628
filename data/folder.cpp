#include "data/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>

namespace upmoe {

namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail_system(const fs::path& path, const char* what) {
  throw SystemError(path, what, errno);
}

}  // namespace

// The answers of std::filesystem::exists do not do: it follows links, and a link that leads nowhere would be no
// obstacle to a rename but is one.
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

bool is_blob_of(const fs::path& file, const fs::path& folder) {
  const fs::path snapshots = folder.parent_path();
  return snapshots.filename() == "snapshots" && file.parent_path() == snapshots.parent_path() / "blobs";
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

fs::path nearest_existing(fs::path path) {
  std::error_code ignored;
  while (!fs::exists(path, ignored) && path.has_relative_path()) path = path.parent_path();
  return path;
}

std::uint64_t free_bytes_at(const fs::path& path) {
  const fs::path there = nearest_existing(fs::absolute(path));
  struct statvfs info {};
  if (statvfs(there.c_str(), &info) != 0) fail_system(there, "asking for its free space");
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

void require_free_space(const fs::path& path, std::uint64_t bytes, const FreeSpace& free_space) {
  const std::uint64_t free = free_space(path);
  if (free < bytes)
    fail(ExitCode::kBadInput,
         "{}: not enough disk: {} bytes ({:.1f} GB) are needed, {} bytes ({:.1f} GB) are free; make room or "
         "write elsewhere",
         path.string(), bytes, static_cast<double>(bytes) / 1e9, free, static_cast<double>(free) / 1e9);
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

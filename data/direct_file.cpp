#include "data/direct_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "kernels/core/system_error.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail_io(const char* what, const fs::path& path) {
  throw SystemError(path, what, errno);
}

}  // namespace

DirectFile::DirectFile(const fs::path& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd_ < 0) fail_io("opening", path);
  direct_fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_DIRECT);
}

DirectFile::~DirectFile() {
  if (fd_ >= 0) ::close(fd_);
  if (direct_fd_ >= 0) ::close(direct_fd_);
}

DirectFile::DirectFile(DirectFile&& o) noexcept
    : path_(std::move(o.path_)), fd_(std::exchange(o.fd_, -1)), direct_fd_(std::exchange(o.direct_fd_, -1)) {}

void DirectFile::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    // Past the page cache where place, memory and length are whole disk blocks, which is what O_DIRECT asks for; the
    // rest of a block, and everything on file systems without it, through the cache.
    const bool direct = direct_fd_ >= 0 && offset % kDiskBlock == 0 && bytes.size() >= kDiskBlock &&
                        reinterpret_cast<std::uintptr_t>(bytes.data()) % kDiskBlock == 0;
    const ssize_t n =
        ::pwrite(direct ? direct_fd_ : fd_, bytes.data(),
                 direct ? bytes.size() / kDiskBlock * kDiskBlock : bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && direct) {  // opened, but not to be written like this
      ::close(std::exchange(direct_fd_, -1));
      continue;
    }
    if (n <= 0) fail_io("writing", path_);
    offset += static_cast<std::uint64_t>(n);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

void DirectFile::sync() {
  if (::fsync(fd_) != 0) fail_io("fsync", path_);
}

}  // namespace upmoe

#include "data/posix_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "data/crc.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {
[[noreturn]] void fail_errno(const fs::path& path, const char* what) {
  throw SystemError(path, what, errno);
}
}  // namespace

PosixFile PosixFile::open_read(const fs::path& path) {
  // O_NONBLOCK: a pipe in place of a file would wait for a writer; it is opened, and refused as no regular file.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_errno(path, "opening");
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    fail(ExitCode::kBadInput, "{}: not a regular file", path.string());
  }
  return {fd, path};
}

PosixFile PosixFile::create(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (fd < 0) fail_errno(path, "creating");
  return {fd, path};
}

PosixFile::PosixFile(PosixFile&& o) noexcept : fd_(o.fd_), path_(std::move(o.path_)) {
  o.fd_ = -1;
}

PosixFile::~PosixFile() {
  if (fd_ >= 0) ::close(fd_);
}

std::uint64_t PosixFile::size() const {
  struct stat info {};
  if (fstat(fd_, &info) != 0) fail_errno(path_, "fstat");
  return static_cast<std::uint64_t>(info.st_size);
}

PosixFile::Stamp PosixFile::stamp() const {
  struct stat info {};
  if (fstat(fd_, &info) != 0) fail_errno(path_, "fstat");
  return {static_cast<std::uint64_t>(info.st_size),
          static_cast<std::int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec};
}

void PosixFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t n = pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(path_, "reading");
    if (n == 0)
      fail(ExitCode::kBadInput, "{}: ends at byte {}, {} more were expected", path_.string(), offset,
           out.size());
    watchdog::heartbeat();  // a slow disk is not a hang
    offset += static_cast<std::uint64_t>(n);
    out = out.subspan(static_cast<std::size_t>(n));
  }
}

void PosixFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail_errno(path_, "writing");
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

void PosixFile::resize(std::uint64_t bytes) {
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) fail_errno(path_, "setting the length");
}

void PosixFile::sync() {
  if (fsync(fd_) != 0) fail_errno(path_, "fsync");
}

void sync_path(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail_errno(path, "opening");
  const int result = fsync(fd);
  // close() may set errno; the error to tell is that of fsync.
  const int error = errno;
  ::close(fd);
  errno = error;
  if (result != 0) fail_errno(path, "fsync");
}

FileChecksum::FileChecksum(const fs::path& path)
    : file_(PosixFile::open_read(path)), size_(file_.size()), block_(std::size_t{1} << 20) {}

bool FileChecksum::advance() {
  if (at_ == size_) return false;
  const std::span<std::byte> block =
      std::span(block_).first(static_cast<std::size_t>(std::min<std::uint64_t>(block_.size(), size_ - at_)));
  file_.read(at_, block);
  crc_ = crc32c(block.data(), block.size(), crc_);
  at_ += block.size();
  return true;
}

std::uint32_t crc32c_of_file(const fs::path& path) {
  FileChecksum checksum(path);
  while (checksum.advance()) {
  }
  return checksum.value();
}

std::string read_text(const fs::path& path, std::uint64_t limit) {
  const PosixFile file = PosixFile::open_read(path);
  const std::uint64_t size = file.size();
  if (size > limit)
    fail(ExitCode::kBadInput, "{}: {} bytes, at most {} are expected", path.string(), size, limit);
  std::string text(static_cast<std::size_t>(size), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

void write_text_synced(const fs::path& path, const std::string& text) {
  PosixFile file = PosixFile::create(path);
  file.write(std::as_bytes(std::span(text)));
  file.sync();
}

}  // namespace upmoe

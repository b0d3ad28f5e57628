#pragma once
// Files by descriptor: whole reads, fsync, sizes. What the system refuses is a SystemError.

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/system_error.h"

namespace upmoe {

class PosixFile {  // move-only; closes itself
 public:
  static PosixFile open_read(const std::filesystem::path& path);  // a regular file, or a link to one
  static PosixFile create(const std::filesystem::path& path);     // new or truncated, for writing
  static PosixFile adopt(int fd, const std::filesystem::path& path) { return {fd, path}; }  // closes it
  ~PosixFile();
  PosixFile(PosixFile&& o) noexcept;
  PosixFile& operator=(PosixFile&&) = delete;
  std::uint64_t size() const;
  // What changes when the file's bytes do.
  struct Stamp {
    std::uint64_t bytes = 0;
    std::int64_t modified_ns = 0;
    bool operator==(const Stamp&) const = default;
  };
  Stamp stamp() const;
  const std::filesystem::path& path() const { return path_; }
  void read(std::uint64_t offset, std::span<std::byte> out) const;  // all of it, or throws
  void write(std::span<const std::byte> bytes);                     // appends
  void resize(std::uint64_t bytes);
  void sync();  // fsync

 private:
  PosixFile(int fd, std::filesystem::path path) : fd_(fd), path_(std::move(path)) {}
  int fd_ = -1;
  std::filesystem::path path_;
};

void sync_path(const std::filesystem::path& path);  // fsync of an existing file or folder
std::uint32_t crc32c_of_file(const std::filesystem::path& path);

// The checksum of a file, read block by block; each block is a sign of life for the watchdog.
class FileChecksum {
 public:
  explicit FileChecksum(const std::filesystem::path& path);
  bool advance();  // one more block; false once the end is reached
  std::uint32_t value() const { return crc_; }

 private:
  PosixFile file_;
  std::uint64_t size_, at_ = 0;
  std::uint32_t crc_ = 0;
  std::vector<std::byte> block_;
};

std::string read_text(const std::filesystem::path& path,
                      std::uint64_t limit);  // throws when larger than limit
void write_text_synced(const std::filesystem::path& path, const std::string& text);

}  // namespace upmoe

#pragma once
// A file that many gigabytes are written to, past the page cache where that can be done.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace upmoe {

// What direct disk access asks of memory addresses, file offsets and lengths.
inline constexpr std::size_t kDiskBlock = 4096;

// Whole disk blocks at block addresses go straight to the disk where the file system can do that: copying
// tens of gigabytes through the page cache costs more processor time than making them, and throws the source
// out of memory. Everything else takes the usual way. Move-only; closes itself; for one thread at a time.
class DirectFile {
 public:
  explicit DirectFile(const std::filesystem::path& path);  // an existing file, kept as it is
  ~DirectFile();
  DirectFile(DirectFile&& o) noexcept;
  DirectFile& operator=(DirectFile&&) = delete;
  void write(std::uint64_t offset, std::span<const std::byte> bytes);
  void sync();  // on disk when it returns

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  int direct_fd_ = -1;  // -1: the file system has no direct access
};

}  // namespace upmoe

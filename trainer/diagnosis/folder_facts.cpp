#include "trainer/diagnosis/folder_facts.h"

#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <span>
#include <sstream>
#include <vector>

#include "data/direct_file.h"
#include "data/file_lock.h"
#include "data/folder.h"
#include "data/posix_file.h"
#include "kernels/core/memory.h"
#include "parallel/host.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kBlock = std::size_t{8} << 20;
constexpr int kSmallFiles = 7;

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A folder of this process's own, gone with what is in it.
class TrialFolder {
 public:
  TrialFolder(const fs::path& above, int rank)
      : path_(above / fmt::format(".upmoe-doctor-{}-{}", static_cast<long>(getpid()), rank)) {
    make_folder(path_);
  }
  ~TrialFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TrialFolder(const TrialFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

double middle(std::vector<double> all) {
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

double write_rate(const fs::path& file, std::uint64_t bytes) {
  const Buffer memory = Buffer::allocate({}, kBlock + kDiskBlock, "a block for the disk");
  std::size_t room = memory.bytes();
  void* at_block = memory.data();
  const std::span block(static_cast<std::byte*>(std::align(kDiskBlock, kBlock, at_block, room)), kBlock);
  for (std::size_t i = 0; i < kBlock; ++i) block[i] = static_cast<std::byte>(i * 2654435761u >> 24);
  PosixFile::create(file);
  DirectFile out(file);
  const Stopwatch watch;
  std::uint64_t at = 0;
  for (; at < bytes; at += kBlock) out.write(at, block);
  out.sync();
  return static_cast<double>(at) / watch.seconds();
}

// mountinfo writes a blank in a path as \040.
std::string unescaped(const std::string& word) {
  std::string out;
  for (std::size_t i = 0; i < word.size(); ++i) {
    if (word[i] == '\\' && word.find_first_not_of("01234567", i + 1) > i + 3) {
      out += static_cast<char>(std::stoi(word.substr(i + 1, 3), nullptr, 8));
      i += 3;
    } else {
      out += word[i];
    }
  }
  return out;
}

bool lies_in(const fs::path& path, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first == folder.end();
}

// Where the table of mounts has none that the folder lies in, as behind chroot: what the kernel says of it.
std::string kind_by_number(const fs::path& existing) {
  struct statfs found {};
  if (::statfs(existing.c_str(), &found) != 0) return "";
  switch (static_cast<unsigned long>(found.f_type)) {
    case TMPFS_MAGIC:
      return "tmpfs";
    case RAMFS_MAGIC:
      return "ramfs";
    case OVERLAYFS_SUPER_MAGIC:
      return "overlay";
    case EXT4_SUPER_MAGIC:
      return "ext4";
    case XFS_SUPER_MAGIC:
      return "xfs";
    case NFS_SUPER_MAGIC:
      return "nfs";
    default:
      return fmt::format("file system {:#x}", static_cast<unsigned long>(found.f_type));
  }
}

}  // namespace

std::string kind_of_file_system(const fs::path& path, const std::string& mounts) {
  std::string kind;
  std::size_t longest = 0;
  std::istringstream lines(mounts);
  // 36 35 98:0 /root-of-it /mnt/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string skipped, point, word;
    for (int i = 0; i < 4; ++i) words >> skipped;
    words >> point;
    while (words >> word && word != "-") {
    }
    std::string found;
    if (!(words >> found)) continue;
    const fs::path mounted = unescaped(point);
    // A later line covers an earlier one at the same place.
    if (!lies_in(path, mounted) || mounted.native().size() < longest) continue;
    longest = mounted.native().size();
    kind = found;
  }
  return kind;
}

std::string read_mounts() {
  return system_text("/proc/self/mountinfo");
}

FolderFacts read_folder(const fs::path& folder, const std::string& mounts) {
  FolderFacts facts{
      .asked = folder, .existing = nearest_existing(fs::absolute(folder).lexically_normal()), .kind = {}};
  std::error_code error;
  const fs::path whole = fs::canonical(facts.existing, error);
  facts.kind = kind_of_file_system(error ? facts.existing : whole, mounts);
  if (facts.kind.empty()) facts.kind = kind_by_number(facts.existing);
  facts.free_bytes = static_cast<double>(free_bytes_at(facts.existing));
  return facts;
}

FolderTrial try_folder(const fs::path& existing, std::uint64_t bytes, int rank) {
  const TrialFolder folder(existing, rank);
  const std::optional<LockedFile> lock = lock_file(folder.path() / "lock");
  if (lock && lock->fd >= 0) close(lock->fd);
  FolderTrial trial;
  trial.has_locks = lock && lock->held;
  trial.write_bytes_per_s = write_rate(folder.path() / "large", bytes);
  std::vector<double> syncs, renames;
  for (int i = 0; i < kSmallFiles; ++i) {
    const fs::path before = folder.path() / fmt::format("{}.new", i),
                   after = folder.path() / fmt::format("{}", i);
    PosixFile file = PosixFile::create(before);
    const std::byte some[4096] = {};
    file.write(some);
    const Stopwatch of_sync;
    file.sync();
    syncs.push_back(of_sync.seconds());
    const Stopwatch of_rename;
    move_path(before, after);
    sync_path(folder.path());
    renames.push_back(of_rename.seconds());
  }
  trial.sync_s = middle(syncs);
  trial.rename_s = middle(renames);
  return trial;
}

}  // namespace upmoe

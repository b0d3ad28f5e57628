#pragma once
// The place that a run writes to: which file system it is, and whether it can be written to.

#include <cstdint>
#include <filesystem>
#include <string>

namespace upmoe {

struct FolderFacts {
  std::filesystem::path asked;     // as it was named; need not exist
  std::filesystem::path existing;  // itself, or the nearest above it that does
  std::string kind;                // of file system: "ext4", "nfs4", "tmpfs"; empty where it is not known
  double free_bytes = 0;           // for this user
};

// `mounts`: the text of /proc/self/mountinfo. Throws Error(kBadInput) when the file system does not answer.
FolderFacts read_folder(const std::filesystem::path& folder, const std::string& mounts);
std::string read_mounts();

// The file system that `path`, absolute and without links, lies on, by mountinfo; empty where it says nothing.
std::string kind_of_file_system(const std::filesystem::path& path, const std::string& mounts);

struct FolderTrial {
  bool has_locks = false;
  double write_bytes_per_s = 0;     // with what it takes until all is on the disk
  double sync_s = 0, rename_s = 0;  // of one small file, each the middle one of several
};

// Writes `bytes` into a folder of its own in `existing`, as a checkpoint is: written, synced, renamed; and takes a lock
// as a run does. Ranks have folders of their own. Leaves nothing behind. Throws Error(kBadInput) in the system's words
// when that cannot be done.
FolderTrial try_folder(const std::filesystem::path& existing, std::uint64_t bytes, int rank);

}  // namespace upmoe

#pragma once
// Names in a file system: what std::filesystem does, with errors that say what to do. Every function throws
// SystemError.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {

// What the operating system refused. An Error(kBadInput) that names the path, the system's reason and, where
// there is one, the cure.
class SystemError : public Error {
 public:
  SystemError(const std::filesystem::path& path, const std::string& what, int number);
  int number() const { return number_; }  // errno
  bool is_missing() const;                // no such file, or a file where a folder should be
  bool is_no_space() const;               // a full disk, a quota, a limit of file sizes
  bool is_of_process() const;             // says nothing about the path: no memory, too many open files

 private:
  int number_;
};

bool path_exists(const std::filesystem::path& path);     // a link counts as itself, wherever it leads
bool is_real_folder(const std::filesystem::path& path);  // a folder, and no link to one; false when absent
void make_folder(const std::filesystem::path& path);     // must not exist
void make_folders(const std::filesystem::path& path);    // with those above it; existing ones are fine
// Never replaces anything: fails when `to` exists.
void move_path(const std::filesystem::path& from, const std::filesystem::path& to);
void remove_file(const std::filesystem::path& path);
void remove_empty_folder(const std::filesystem::path& path);
// Full paths, ordered by name. None when the folder does not exist.
std::vector<std::filesystem::path> entries_of(const std::filesystem::path& folder);
std::uint64_t free_bytes_at(const std::filesystem::path& path);  // for this user
std::uint64_t bytes_in(const std::filesystem::path& folder);     // of the regular files right in it

}  // namespace upmoe

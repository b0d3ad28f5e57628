#pragma once
// Output that appears under its name complete or not at all.
//
// While it is made, a folder NAME lies in NAME.upmoe-partial/ beside its final place, under a name of its own
// there, and a file NAME is NAME.upmoe-partial. A lock tells two jobs with one target apart, and a job that was
// killed from one that still works: what a killed one left is cleared by the next that has the lock. Nothing else
// is ever removed. Where a file system has no locks, names of their own keep jobs apart, and left-overs stay.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/partial_folder.h"
#include "data/posix_file.h"

namespace upmoe {

// Absolute, without links, dots or trailing slash; the last parts need not exist.
std::filesystem::path resolved(const std::filesystem::path& path);

// Where a new folder would lie, after every check that needs no writing. `inputs`: folders that are read; the
// output may lie in none of them and contain none. Throws Error(kUsage): overlaps an input, exists and is no
// empty folder, cannot be replaced (the working directory, a mount point), lies below a file.
std::filesystem::path check_new_directory(const std::filesystem::path& to,
                                          const std::vector<std::filesystem::path>& inputs);

// For one process; the other ranks write to its path(). Every failure is an Error: kUsage as above and when
// another job makes the same folder, kBadInput from the file system.
class StagedDirectory {
 public:
  // Checks, takes the lock and clears what a killed job left. Makes the folders above `to`.
  StagedDirectory(const std::filesystem::path& to, const std::vector<std::filesystem::path>& inputs);
  ~StagedDirectory();  // removes everything again, unless commit() returned
  StagedDirectory(const StagedDirectory&) = delete;
  const std::filesystem::path& target() const { return target_; }
  const std::filesystem::path& path() const { return part_->path(); }  // the folder to fill; not made yet
  void create() { part_->create(); }
  void commit() { part_->commit(); }  // give_name: fsync the files first

 private:
  explicit StagedDirectory(std::filesystem::path target);  // nothing made yet
  void prepare(const std::vector<std::filesystem::path>& inputs);
  std::filesystem::path target_, container_;
  std::optional<PartialFolder> part_;           // in the container
  std::vector<std::filesystem::path> parents_;  // made here, outermost first
  int lock_ = -1;
};

// The same for one file, which replaces an older one of its name.
class StagedFile {
 public:
  // `inputs`: files and folders that are read; no part of them is replaced.
  StagedFile(const std::filesystem::path& to, const std::vector<std::filesystem::path>& inputs = {});
  ~StagedFile();
  StagedFile(const StagedFile&) = delete;
  const std::filesystem::path& target() const { return target_; }
  void write(std::span<const std::byte> bytes);  // appends
  void commit();

 private:
  std::filesystem::path target_, partial_;
  std::unique_ptr<PosixFile> file_;
  bool committed_ = false;
};

// A whole small file in place of what is there.
void replace_text(const std::filesystem::path& path, const std::string& text);

}  // namespace upmoe

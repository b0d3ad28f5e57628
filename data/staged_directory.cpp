#include "data/staged_directory.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <random>
#include <utility>

#include "data/file_lock.h"
#include "data/folder.h"
#include "kernels/core/log.h"
#include "parallel/host.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".upmoe-partial";
constexpr const char* kLockName = "upmoe.lock";
constexpr const char* kPartPrefix = "part-";

fs::path with_suffix(fs::path path, const char* suffix) {
  path += suffix;
  return path;
}

// By identity, not by name: a second mount or another spelling is the same folder.
bool lies_within(fs::path inner, const fs::path& outer) {
  std::error_code ignored;
  for (;; inner = inner.parent_path()) {
    if (inner == outer || fs::equivalent(inner, outer, ignored)) return true;
    if (!inner.has_relative_path()) return false;
  }
}

void refuse_overlap(const fs::path& output, const std::vector<fs::path>& inputs) {
  for (const fs::path& given : inputs) {
    const fs::path input = resolved(given);
    if (lies_within(output, input) || lies_within(input, output))
      fail(ExitCode::kUsage, "output {} and input {} overlap; write to a place of its own", output.string(),
           input.string());
  }
}

bool is_mount_point(const fs::path& dir) {
  struct stat own {
  }, above{};
  return stat(dir.c_str(), &own) == 0 && stat(dir.parent_path().c_str(), &above) == 0 &&
         own.st_dev != above.st_dev;
}

// An empty name, and a link that leads nowhere: what stands at its end cannot be replaced.
void refuse_no_place(const fs::path& to) {
  if (to.empty()) fail(ExitCode::kUsage, "the output has an empty name");
  const fs::path plain = to.has_filename() ? to : to.parent_path();
  std::error_code ignored;
  if (fs::is_symlink(fs::symlink_status(plain, ignored)) && !fs::exists(plain, ignored))
    fail(ExitCode::kUsage,
         "output {} is a link to {}, which does not exist; make that folder or remove the link",
         plain.string(), fs::read_symlink(plain).string());
}

void refuse_file_above(const fs::path& output) {
  const fs::path above = nearest_existing(output.parent_path());
  if (!fs::is_directory(above))
    fail(ExitCode::kUsage, "output {}: {} is a file, a folder is needed there", output.string(),
         above.string());
}

void refuse_existing(const fs::path& dir) {
  if (!fs::exists(dir)) return;
  std::error_code ignored;
  if (fs::equivalent(dir, fs::current_path(ignored), ignored))
    fail(ExitCode::kUsage, "output {} is the working directory of this command; give a folder inside it",
         dir.string());
  if (!fs::is_directory(dir))
    fail(ExitCode::kUsage, "output {} exists and is no folder; remove it or write elsewhere", dir.string());
  if (is_mount_point(dir))
    fail(ExitCode::kUsage, "output {} is a mount point, which cannot be replaced; give a folder inside it",
         dir.string());
  if (!fs::is_empty(dir))
    fail(ExitCode::kUsage, "output {} exists and is not empty; remove it or write elsewhere", dir.string());
}

std::string owner_in(const fs::path& lock) {
  try {
    const std::string text = read_text(lock, 512);
    return text.empty() ? "unknown" : text;
  } catch (const Error&) {  // it has just ended
    return "unknown";
  }
}

void write_owner(int fd) {
  const std::string owner = fmt::format("process {} on {}", ::getpid(), host_name());
  // For people; who reads nothing there is told "unknown".
  if (::ftruncate(fd, 0) == 0 && ::pwrite(fd, owner.data(), owner.size(), 0) < 0) return;
}

// The folder may be somebody else's: one without our lock file must be empty.
void refuse_foreign(const fs::path& container) {
  std::error_code ignored;
  const fs::file_status status = fs::symlink_status(container, ignored);
  const bool ours =
      fs::is_directory(status) &&
      (fs::exists(fs::symlink_status(container / kLockName, ignored)) || fs::is_empty(container, ignored));
  if (fs::exists(status) && !ours)
    fail(ExitCode::kUsage,
         "{}: found where the output is prepared, but no run of this program left it; move it away",
         container.string());
}

// The lock on a container, made where there is none.
LockedFile take_container(const fs::path& container, const fs::path& target) {
  while (true) {
    refuse_foreign(container);
    fs::create_directory(container);
    const std::optional<LockedFile> lock = lock_file(container / kLockName);
    if (!lock) continue;  // its holder has just ended and removed it
    if (lock->busy)
      fail(ExitCode::kUsage, "output {} is being written by another job ({}); wait for it or write elsewhere",
           target.string(), owner_in(container / kLockName));
    return *lock;
  }
}

void clear_leftovers(const fs::path& container, const fs::path& target) {
  std::vector<fs::path> parts;
  for (const auto& entry : fs::directory_iterator(container))
    if (entry.path().filename().string().starts_with(kPartPrefix)) parts.push_back(entry.path());
  for (const fs::path& part : parts) fs::remove_all(part);
  if (!parts.empty()) log::info("{}: removed what an interrupted job had left", target.string());
}

// Also when that cannot be seen.
bool may_hold_parts(const fs::path& container) noexcept {
  std::error_code error;
  for (fs::directory_iterator entry(container, error), end; !error && entry != end; entry.increment(error))
    if (entry->path().filename().string().starts_with(kPartPrefix)) return true;
  return static_cast<bool>(error);
}

void remove_quietly(const fs::path& path) noexcept {
  std::error_code ignored;  // the error that led here is the one to tell
  fs::remove_all(path, ignored);
}

}  // namespace

fs::path resolved(const fs::path& path) {
  const fs::path full = fs::weakly_canonical(fs::absolute(path)).lexically_normal();
  return full.has_filename() ? full : full.parent_path();
}

fs::path check_new_directory(const fs::path& to, const std::vector<fs::path>& inputs) {
  fs::path target;
  with_system_errors([&] {
    refuse_no_place(to);
    target = resolved(to);
    refuse_overlap(target, inputs);
    refuse_file_above(target);
    refuse_existing(target);
    refuse_foreign(with_suffix(target, kSuffix));
  });
  return target;
}

// Delegating: where preparing fails, the destructor takes back what was made so far.
StagedDirectory::StagedDirectory(const fs::path& to, const std::vector<fs::path>& inputs)
    : StagedDirectory(check_new_directory(to, inputs)) {
  with_system_errors([&] { prepare(inputs); });
}

StagedDirectory::StagedDirectory(fs::path target)
    : target_(std::move(target)), container_(with_suffix(target_, kSuffix)) {}

void StagedDirectory::prepare(const std::vector<fs::path>& inputs) {
  refuse_overlap(container_, inputs);
  std::vector<fs::path> missing;
  for (fs::path p = target_.parent_path(); !fs::exists(p); p = p.parent_path()) missing.push_back(p);
  for (; !missing.empty(); missing.pop_back()) {
    if (fs::create_directory(missing.back())) parents_.push_back(missing.back());
  }
  const LockedFile lock = take_container(container_, target_);
  lock_ = lock.fd;
  write_owner(lock_);
  if (lock.held) {
    clear_leftovers(container_, target_);
  } else {
    log::warning("{}: this file system has no locks; do not start two jobs with one output",
                 target_.string());
  }
  part_.emplace(container_ / fmt::format("{}{:08x}", kPartPrefix, std::random_device{}()), target_,
                Existing::kReplaced, remove_quietly);
}

// The order of the end, for a job that comes in between:
//
//   1. the part goes (or has its name)     while the lock is held: no other job clears it meanwhile
//   2. the lock file goes                  unless a part is left: by the lock the next job knows it for ours
//   3. the lock is given back
//   4. the container goes                  if it is empty; else another job has begun, or there is something foreign
StagedDirectory::~StagedDirectory() {
  std::error_code ignored;
  const bool committed = part_ && part_->committed();
  part_.reset();
  if (lock_ >= 0) {
    // While the lock is held: nobody else's can stand there. A part that could not be removed is ours by it alone.
    if (!may_hold_parts(container_)) fs::remove(container_ / kLockName, ignored);
    ::close(lock_);
    fs::remove(container_, ignored);  // stays where there is something of somebody else in it
  }
  if (committed) return;
  for (auto it = parents_.rbegin(); it != parents_.rend(); ++it) fs::remove(*it, ignored);
}

StagedFile::StagedFile(const fs::path& to, const std::vector<fs::path>& inputs) {
  with_system_errors([&] {
    refuse_no_place(to);
    target_ = resolved(to);
    partial_ = with_suffix(target_, kSuffix);
    if (fs::exists(target_)) refuse_overlap(target_, inputs);
    refuse_file_above(target_);
    if (fs::exists(target_) && !fs::is_regular_file(target_))
      fail(ExitCode::kUsage, "output {} exists and is no regular file; write elsewhere", target_.string());
  });
  const std::optional<LockedFile> lock = lock_file(partial_);
  if (!lock)
    fail(ExitCode::kBadInput, "{}: the folder {} does not exist; make it first", target_.string(),
         target_.parent_path().string());
  if (lock->busy)
    fail(ExitCode::kUsage, "output {} is being written by another job; wait for it or write elsewhere",
         target_.string());
  file_ = std::make_unique<PosixFile>(PosixFile::adopt(lock->fd, partial_));
  file_->resize(0);  // of a job that was killed
}

StagedFile::~StagedFile() {
  std::error_code ignored;
  if (file_ != nullptr && !committed_) fs::remove(partial_, ignored);
}

void StagedFile::write(std::span<const std::byte> bytes) {
  file_->write(bytes);
}

void StagedFile::commit() {
  give_name(partial_, target_, Existing::kReplaced);
  committed_ = true;
}

void replace_text(const fs::path& path, const std::string& text) {
  StagedFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace upmoe

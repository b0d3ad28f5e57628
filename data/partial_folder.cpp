#include "data/partial_folder.h"

#include <cerrno>
#include <cstdio>
#include <utility>

#include "data/folder.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// rename(2), which replaces a file by a file and an empty folder by a folder, and nothing else.
void move_over(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) == 0) return;
  const int error = errno;
  if (error == ENOTEMPTY || error == EEXIST || error == ENOTDIR || error == EISDIR)
    fail(ExitCode::kBadInput, "{}: came into being while the output was prepared; it is left as it is",
         to.string());
  throw SystemError(to, "giving it its name", error);
}

bool confirm_name(const fs::path& path) {
  try {
    sync_path(fs::absolute(path).parent_path());
    return true;
  } catch (const Error& e) {
    log::warning(
        "{} is complete, but the disk did not confirm its name, and a power cut may still lose it: {}",
        path.string(), e.what());
    return false;
  }
}

}  // namespace

// What a power cut leaves after each step:
//
//   filling              PARTIAL with some of its files, which nobody takes for the output
//   sync_path(partial)   PARTIAL with every name in it; whoever wrote a file has synced its contents
//   rename               PARTIAL or TARGET, whole either way; unsynced it might be a TARGET with names missing
//   sync of the parent   TARGET
bool give_name(const fs::path& partial, const fs::path& target, Existing existing) {
  sync_path(partial);
  // The one moment at which the output comes into being.
  if (existing == Existing::kReplaced) {
    move_over(partial, target);
  } else {
    move_path(partial, target);
  }
  return confirm_name(target);
}

PartialFolder::PartialFolder(fs::path path, fs::path target, Existing existing, Remove remove)
    : path_(std::move(path)), target_(std::move(target)), existing_(existing), remove_(std::move(remove)) {}

PartialFolder::~PartialFolder() {
  if (!made_ || committed_) return;
  try {
    remove_(path_);
  } catch (const Error&) {  // the error that led here is the one to tell; the next job clears it away
  }
}

void PartialFolder::create() {
  make_folder(path_);
  made_ = true;
}

bool PartialFolder::commit() {
  const bool durable = give_name(path_, target_, existing_);
  committed_ = true;
  return durable;
}

}  // namespace upmoe

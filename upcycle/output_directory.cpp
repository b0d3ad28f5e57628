#include "upcycle/output_directory.h"

#include <algorithm>
#include <system_error>

#include "data/posix_file.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

// Absolute, without links, dots or trailing slash; the last parts need not exist.
fs::path resolved(const fs::path& path) {
  const fs::path full = fs::weakly_canonical(fs::absolute(path)).lexically_normal();
  return full.has_filename() ? full : full.parent_path();
}

bool is_within(const fs::path& inner, const fs::path& outer) {
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

// A file that an upcycling run makes, in either form of its output.
bool is_output_file(const std::string& name) {
  const auto& companions = companion_files();
  return name.ends_with(".safetensors") || name == "model.safetensors.index.json" || name == "config.json" ||
         name == "upcycle_report.json" || name == "manifest.json" || name == "index.h5" ||
         (name.starts_with("shard_") && name.ends_with(".h5")) ||
         std::find(companions.begin(), companions.end(), name) != companions.end();
}

// A directory of this name may be someone else's: only what an upcycling run leaves behind is removed.
void remove_leftover(const fs::path& tmp) {
  if (!fs::exists(fs::symlink_status(tmp))) return;
  for (const auto& entry : fs::directory_iterator(tmp)) {
    if (!is_output_file(entry.path().filename().string()) || !entry.is_regular_file()) {
      fail(ExitCode::kUsage,
           "{}: found where the output is prepared, but no run of this program left it; move it away",
           entry.path().string());
    }
  }
  fs::remove_all(tmp);
}

}  // namespace

std::uint64_t free_space_of(const fs::path& dir) {
  return fs::space(dir).available;
}

OutputPaths plan_output(const fs::path& from, const fs::path& to) {
  const fs::path source = resolved(from), dir = resolved(to);
  const OutputPaths paths{dir, dir.string() + ".tmp"};
  if (is_within(dir, source) || is_within(source, dir) || is_within(source, paths.tmp)) {
    fail(ExitCode::kUsage, "output {} and source {} overlap; give the output a directory of its own",
         dir.string(), source.string());
  }
  if (fs::exists(dir) && !(fs::is_directory(dir) && fs::is_empty(dir))) {
    fail(ExitCode::kUsage, "output {} exists and is not empty; remove it or give another --to", dir.string());
  }
  return paths;
}

void make_room(const OutputPaths& paths, std::uint64_t bytes, const FreeSpace& free_space) {
  remove_leftover(paths.tmp);
  fs::create_directories(paths.tmp.parent_path());
  const std::uint64_t free = free_space(paths.tmp.parent_path());
  if (free < bytes) {
    fail(ExitCode::kBadInput,
         "{}: not enough disk: {} bytes ({:.1f} GB) are needed, {} bytes ({:.1f} GB) are free; "
         "make room or give another --to",
         paths.dir.string(), bytes, static_cast<double>(bytes) / 1e9, free, static_cast<double>(free) / 1e9);
  }
}

void create_output(const OutputPaths& paths, const HfLayout& layout, std::uint64_t bytes,
                   const FreeSpace& free_space) {
  make_room(paths, bytes, free_space);
  fs::create_directory(paths.tmp);
  for (const HfLayout::File& file : layout.files) {
    const fs::path path = paths.tmp / file.name;
    PosixFile::create(path);
    fs::resize_file(path, file.bytes);
  }
}

OutputFiles::OutputFiles(const fs::path& tmp, const HfLayout& layout) {
  for (const HfLayout::File& file : layout.files) files_.emplace_back(tmp / file.name);
}

void OutputFiles::write(std::size_t file, std::uint64_t offset, std::span<const std::byte> bytes) {
  files_.at(file).write(offset, bytes);
}

void OutputFiles::sync() {
  for (DirectFile& f : files_) f.sync();
}

void copy_companions(const fs::path& from, const fs::path& tmp) {
  for (const std::string& name : companion_files()) {
    if (!fs::exists(from / name)) continue;
    fs::copy_file(from / name, tmp / name);
    sync_path(tmp / name);
  }
}

void commit_output(const OutputPaths& paths, const HfLayout& layout) {
  for (const HfLayout::File& file : layout.files) {
    const std::uint64_t found = fs::file_size(paths.tmp / file.name);
    if (found != file.bytes) {
      fail(ExitCode::kFailure, "{}: {} bytes, expected {}", (paths.tmp / file.name).string(), found,
           file.bytes);
    }
  }
  sync_path(paths.tmp);
  fs::rename(paths.tmp, paths.dir);
  sync_path(paths.dir.parent_path());
}

void discard_output(const OutputPaths& paths) noexcept {
  std::error_code ignored;  // the error that led here is the one to tell
  fs::remove_all(paths.tmp, ignored);
}

}  // namespace upmoe

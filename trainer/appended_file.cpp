#include "trainer/appended_file.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostPending = std::size_t{64} << 20;

}  // namespace

AppendedFile::AppendedFile(fs::path path, std::string what) : path_(std::move(path)), what_(std::move(what)) {
  std::error_code none;
  const std::uintmax_t size = fs::file_size(path_, none);
  written_ = none ? 0 : size;
  out_.open(path_, std::ios::app | std::ios::binary);
}

AppendedFile::~AppendedFile() {
  if (pending_.empty() || write_pending()) return;
  cut_back();
  log::warning("{}: still cannot be written; the last {} bytes of {} are lost", path_.string(),
               pending_.size(), what_);
}

void AppendedFile::cut_back() {
  out_.clear();
  out_.close();  // which may try once more to write what it still has
  std::error_code ignored;
  if (fs::exists(path_, ignored) && fs::file_size(path_, ignored) > written_)
    fs::resize_file(path_, written_, ignored);
  out_.clear();
}

bool AppendedFile::write_pending() {
  if (!out_.is_open() || !out_) {
    cut_back();
    out_.open(path_, std::ios::app | std::ios::binary);
  }
  out_.write(pending_.data(), static_cast<std::streamsize>(pending_.size())).flush();
  return static_cast<bool>(out_);
}

void AppendedFile::append(const std::string& record) {
  pending_ += record;
  errno = 0;
  if (write_pending()) {
    written_ += pending_.size();
    pending_.clear();
    if (failing_)
      log::info("{}: is written again{}", path_.string(),
                lost_ ? "; some of it is lost" : "; nothing is lost");
    failing_ = lost_ = false;
    return;
  }
  if (!failing_)
    log::warning("{}: cannot be written{}; training goes on, and {} wait until it can", path_.string(),
                 errno != 0 ? fmt::format(" ({})", std::strerror(errno)) : "", what_);
  failing_ = true;
  if (pending_.size() <= kMostPending) return;
  if (!lost_) log::warning("{}: too much waits; {} are lost from here on", path_.string(), what_);
  lost_ = true;
  pending_.clear();
}

}  // namespace upmoe

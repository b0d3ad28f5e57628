#include "upcycle/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "kernels/core/log.h"

namespace upmoe {

Progress::Progress(std::string label, std::uint64_t total_bytes, bool shown)
    : label_(std::move(label)),
      total_(total_bytes),
      shown_(shown),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      printed_(start_) {}

void Progress::add(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  done_ += bytes;
  const auto now = Clock::now();
  const auto pause = terminal_ ? std::chrono::milliseconds(200) : std::chrono::milliseconds(10'000);
  if (shown_ && now - printed_ >= pause) print(now, false);
}

void Progress::finish() {
  const std::lock_guard lock(mutex_);
  if (shown_) print(Clock::now(), true);
}

void Progress::print(Clock::time_point now, bool last) {
  printed_ = now;
  const double seconds = std::max(1e-3, std::chrono::duration<double>(now - start_).count());
  const double done = static_cast<double>(done_), total = static_cast<double>(total_);
  const double share = total > 0 ? std::min(1.0, done / total) : 1.0;
  const auto left = static_cast<long>(done > 0 ? seconds * (total - done) / done : 0);
  std::string line = fmt::format("{} {:3.0f} %  {:.2f} of {:.2f} GB  {:.0f} MB/s", label_, 100 * share,
                                 done / 1e9, total / 1e9, done / 1e6 / seconds);
  line += last ? fmt::format("  {:.1f} s", seconds) : fmt::format("  {}:{:02} left", left / 60, left % 60);
  if (terminal_) {
    constexpr int kWidth = 24;
    const auto full = static_cast<int>(share * kWidth);
    line = fmt::format("\r[{:#<{}}{:.<{}}] {}\033[K{}", "", full, "", kWidth - full, line, last ? "\n" : "");
  } else {
    line = log::timestamp() + line + "\n";
  }
  std::fputs(line.c_str(), stderr);  // nobody who looks is no error
  std::fflush(stderr);
}

}  // namespace upmoe

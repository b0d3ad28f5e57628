#pragma once
// How far a long job is, on standard error: one line rewritten in place on a terminal, a line now and then elsewhere.

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace upmoe {

class Progress {
 public:
  Progress(std::string label, std::uint64_t total_bytes, bool shown);
  void add(std::uint64_t bytes);  // safe for several threads
  void finish();                  // leaves the last line standing

 private:
  using Clock = std::chrono::steady_clock;
  void print(Clock::time_point now, bool last);

  std::string label_;
  std::uint64_t total_, done_ = 0;
  bool shown_, terminal_;
  Clock::time_point start_, printed_;
  std::mutex mutex_;
};

}  // namespace upmoe

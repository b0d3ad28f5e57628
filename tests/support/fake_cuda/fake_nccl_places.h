#pragma once
// How many of NCCL's operations a pretended GPU takes at once, and in which order they begin.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string_view>

namespace fake_cuda {

// A GPU has room for few operations at once, and those that have begun keep their place until their peers have come.
class NcclPlaces {
 public:
  struct Turn {
    int device;
    std::uint64_t number;
    bool in_order;
  };
  // When the operation is given.
  Turn next(int device) {
    const char* order = std::getenv("NCCL_LAUNCH_ORDER_IMPLICIT");
    const std::lock_guard lock(mutex_);
    Gpu& gpu = gpus_[device];
    gpu.waiting.insert(gpu.given);
    return {device, gpu.given++, order != nullptr && std::string_view(order) == "1"};
  }
  // On its stream, when that has come to it.
  void enter(const Turn& t, const std::atomic<bool>& aborted) {
    std::unique_lock lock(mutex_);
    Gpu& gpu = gpus_[t.device];
    changed_.wait(lock, [&] {
      return aborted || (gpu.busy < at_once_ && (!t.in_order || *gpu.waiting.begin() == t.number));
    });
    gpu.waiting.erase(t.number);
    ++gpu.busy;
    changed_.notify_all();
  }
  void leave(const Turn& t) {
    const std::lock_guard lock(mutex_);
    --gpus_[t.device].busy;
    changed_.notify_all();
  }
  void look_again() {
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  void set_at_once(int operations) {
    const std::lock_guard lock(mutex_);
    at_once_ = operations;
  }

 private:
  struct Gpu {
    std::set<std::uint64_t> waiting;  // those that have not begun
    std::uint64_t given = 0;
    int busy = 0;
  };
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int, Gpu> gpus_;
  int at_once_ = 4;
};

}  // namespace fake_cuda

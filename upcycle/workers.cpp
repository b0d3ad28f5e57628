#include "upcycle/workers.h"

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel/watchdog.h"

namespace upmoe {

void run_workers(int threads, const std::function<void(const std::atomic<bool>& stop)>& body) {
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::exception_ptr first;
  const auto guarded = [&] {
    try {
      body(stop);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (first == nullptr) first = std::current_exception();
      stop = true;
    }
  };
  std::atomic<int> left = threads;
  {
    std::vector<std::jthread> workers;
    for (int i = 0; i < threads; ++i)
      workers.emplace_back([&] {
        guarded();
        --left;
      });
    // The workers' heartbeats count as this thread's progress while it waits.
    watchdog::wait_until([&] { return left == 0; });
  }
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace upmoe

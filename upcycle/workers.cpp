#include "upcycle/workers.h"

#include <sched.h>

#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace upmoe {

int default_threads() {
  if (const char* set = std::getenv("OMP_NUM_THREADS")) {
    const int n = std::atoi(set);
    if (n > 0) return n;
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
  return 1;
}

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
  {
    std::vector<std::jthread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(guarded);
    guarded();
  }
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace upmoe

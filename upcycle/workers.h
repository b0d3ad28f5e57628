#pragma once
// Threads that live for one call.

#include <atomic>
#include <functional>

namespace upmoe {

// OMP_NUM_THREADS where set (launchers set it per rank), else the processors this process may run on.
int default_threads();

// Runs body on `threads` threads, this one included, and waits for all. The first exception is rethrown here;
// `stop` then tells the others to come home.
void run_workers(int threads, const std::function<void(const std::atomic<bool>& stop)>& body);

}  // namespace upmoe

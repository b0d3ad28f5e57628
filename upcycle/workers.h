#pragma once
// Threads that live for one call.

#include <atomic>
#include <functional>

namespace upmoe {

// Runs body on `threads` other threads and waits for all, as the watchdog wants it. The first exception is
// rethrown here; `stop` then tells the others to come home.
void run_workers(int threads, const std::function<void(const std::atomic<bool>& stop)>& body);

}  // namespace upmoe

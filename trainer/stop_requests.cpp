#include "trainer/stop_requests.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <ctime>

namespace upmoe {

namespace {

// A signal may be handled on any thread, and between any two instructions of the one that takes the requests.
std::atomic<bool> save_asked = false;
std::atomic<std::int64_t> stop_asked_at = 0;  // nanoseconds of the first; 0: not asked
static_assert(std::atomic<std::int64_t>::is_always_lock_free, "a signal handler may use these");

constexpr std::int64_t kSameRequest = 500'000'000;  // nanoseconds

std::int64_t now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec + 1;
}

void on_signal(int signal) {
  if (signal == SIGUSR1) {
    save_asked = true;
    return;
  }
  std::int64_t first = 0;
  // The first Ctrl-C asks for a stop. A terminal and mpirun both pass it on, so what comes within half a second is the
  // same one; a later one is a user who does not want to wait for the save.
  if (stop_asked_at.compare_exchange_strong(first, now()) || signal == SIGUSR2) return;
  if (now() - first >= kSameRequest) _exit(128 + signal);
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGUSR1, SIGUSR2, SIGTERM, SIGINT}) sigaction(signal, &action, nullptr);
  struct sigaction hangup {};
  sigaction(SIGHUP, nullptr, &hangup);
  if (hangup.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, nullptr);
}

std::int64_t take_requests() {
  return (save_asked.exchange(false) ? kSaveRequest : 0) + (stop_asked_at != 0 ? kStopRequest : 0);
}

}  // namespace upmoe

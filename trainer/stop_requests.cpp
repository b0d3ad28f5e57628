#include "trainer/stop_requests.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace upmoe {

namespace {

// A signal may be handled on any thread, and between any two instructions of the one that takes the requests.
std::atomic<bool> save_asked = false, stop_asked = false;
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may use these");

void on_signal(int signal) {
  if (signal == SIGUSR1) {
    save_asked = true;
  } else if (stop_asked.exchange(true) && signal != SIGUSR2) {
    _exit(128 + signal);
  }
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
  return (save_asked.exchange(false) ? kSaveRequest : 0) + (stop_asked ? kStopRequest : 0);
}

}  // namespace upmoe

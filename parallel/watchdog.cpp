#include "parallel/watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "kernels/core/log.h"

namespace upmoe::watchdog {

namespace {

// The newest of the moments it was told of, by any thread.
class Moment {
 public:
  void reached(Clock::time_point t) {
    const Clock::rep count = t.time_since_epoch().count();
    Clock::rep old = at_.load(std::memory_order_relaxed);
    while (old < count && !at_.compare_exchange_weak(old, count, std::memory_order_relaxed)) {
    }
  }
  Clock::time_point at() const {
    return Clock::time_point(Clock::duration(at_.load(std::memory_order_relaxed)));
  }

 private:
  std::atomic<Clock::rep> at_ = 0;
};

struct State {
  std::mutex mutex;
  std::condition_variable stop_asked;
  bool running = false;
  int rank = 0;
  std::chrono::milliseconds deadline{0};
  std::atomic<std::thread::id> rank_thread;
  Moment progress;  // of the rank's own thread
  Moment beside;    // of others, which counts while that one waits for no peer
  std::uint64_t sequence = 0;
  struct Collective {
    std::string verb, waiting_for;
    ExitCode code = ExitCode::kHang;
  };
  std::map<std::uint64_t, Collective> in_flight;
  std::deque<std::string> finished;  // the newest ten
  std::string phase;                 // empty: none
  std::jthread thread;
  // Of the thread that gave `tell` alone.
  std::thread::id tells;
  std::function<void()> tell;
  Clock::time_point told;

  // While the rank waits for peers, its other threads (reading data, writing a checkpoint) go on whether the peers live
  // or not: their progress must not hide a hang.
  Clock::time_point last_progress() const {
    return in_flight.empty() && phase.empty() ? std::max(progress.at(), beside.at()) : progress.at();
  }
};

State& state() {
  static State* s = new State;  // never destroyed: a rank's thread may report while the process ends
  return *s;
}

// Ranks notice a hang within moments of each other: the lowest one that did speaks, and its end is theirs, by
// a signal that is no request to save any more. mpirun takes a second from one rank's end to that signal.
void let_lower_ranks_speak(int rank) {
  std::signal(SIGTERM, SIG_DFL);
  std::this_thread::sleep_for(std::chrono::milliseconds(1500) * std::min(rank, 3));
}

[[noreturn]] void end_the_process(const State& s) {
  const auto silent = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - s.last_progress());
  std::string text = fmt::format("{}upmoe: error: rank {}: no progress for {:.1f} s: ", log::timestamp(),
                                 s.rank, static_cast<double>(silent.count()) / 1000.0);
  if (s.in_flight.empty() && !s.phase.empty()) {
    text += fmt::format("the {} did not finish: it waits for a peer, stuck, stopped or unreachable", s.phase);
  } else if (s.in_flight.empty()) {
    text +=
        "no collective was under way, so this rank itself is stuck or slow; raise --deadline if one "
        "operation takes that long";
  } else {
    const auto& [number, collective] = *s.in_flight.begin();
    text += fmt::format("the collective {} (number {}) did not finish: {}, stuck, stopped or unreachable",
                        collective.verb, number,
                        collective.waiting_for.empty() ? "it waits for a peer" : collective.waiting_for);
  }
  if (!s.finished.empty()) {
    text += "\n  last finished:";
    for (const std::string& f : s.finished) text += " " + f;
  }
  text += "\n";
  let_lower_ranks_speak(s.rank);
  (void)!write(2, text.data(), text.size());
  // _exit: destructors and MPI_Finalize would wait for the very peers that do not answer.
  _exit(static_cast<int>(s.in_flight.empty() ? ExitCode::kHang : s.in_flight.begin()->second.code));
}

void watch() {
  State& s = state();
  std::unique_lock lock(s.mutex);
  // Ten looks per deadline: a hang is noticed at most a tenth of it late.
  const auto pause = std::max<std::chrono::milliseconds>(s.deadline / 10, std::chrono::milliseconds(10));
  while (s.running) {
    const auto began = Clock::now();
    s.stop_asked.wait_for(lock, pause);
    // Overslept: the whole process was stopped (SIGSTOP, a debugger, a suspended machine). It is not the one
    // to say what hangs; the others' time did not stand still.
    if (Clock::now() - began > pause + s.deadline / 2) s.progress.reached(Clock::now());
    if (s.running && Clock::now() - s.last_progress() > s.deadline) end_the_process(s);
  }
}

void tell_if_due(State& s, Clock::time_point now) {
  if (s.tells != std::this_thread::get_id() || !s.tell) return;
  constexpr auto kOften = std::chrono::milliseconds(50);
  // Eight signs per deadline: one or two may come late without a peer being taken for dead.
  if (now - s.told < std::max<std::chrono::milliseconds>(s.deadline / 8, kOften)) return;
  s.told = now;
  s.tell();
}

}  // namespace

void start(std::chrono::milliseconds deadline, int rank) {
  State& s = state();
  stop();
  const std::lock_guard lock(s.mutex);
  s.deadline = deadline;
  s.rank = rank;
  s.rank_thread = std::this_thread::get_id();
  s.sequence = 0;
  s.finished.clear();
  s.progress.reached(Clock::now());
  s.running = true;
  s.thread = std::jthread(watch);
}

void stop() {
  State& s = state();
  std::jthread ended;
  {
    const std::lock_guard lock(s.mutex);
    s.running = false;
    // Joined when `ended` goes, behind the lock: the thread needs the lock once more to see that it is to stop.
    ended = std::move(s.thread);
    s.stop_asked.notify_all();
  }
}

void heartbeat() {
  State& s = state();
  const auto now = Clock::now();
  if (std::this_thread::get_id() == s.rank_thread) {
    s.progress.reached(now);
    tell_if_due(s, now);
  } else {
    s.beside.reached(now);
  }
}

void wait_until(const std::function<bool()>& done) {
  State& s = state();
  // The rank's own thread makes no progress here, but the thread that it waits for does: then peers are told so.
  for (auto seen = s.beside.at(); !done();) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (s.beside.at() == seen) continue;
    seen = s.beside.at();
    tell_if_due(s, Clock::now());
  }
}

std::uint64_t enter(const char* verb, ExitCode code) {
  State& s = state();
  s.progress.reached(Clock::now());
  const std::lock_guard lock(s.mutex);
  const std::uint64_t sequence = ++s.sequence;
  s.in_flight[sequence] = {verb, {}, code};
  return sequence;
}

Phase::Phase(const char* what) {
  State& s = state();
  s.progress.reached(Clock::now());
  const std::lock_guard lock(s.mutex);
  s.phase = what;
}

Phase::~Phase() {
  State& s = state();
  s.progress.reached(Clock::now());
  const std::lock_guard lock(s.mutex);
  s.phase.clear();
}

void waiting_for(std::uint64_t sequence, std::string whom) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const auto it = s.in_flight.find(sequence);
  if (it != s.in_flight.end()) it->second.waiting_for = std::move(whom);
}

void leave(std::uint64_t sequence) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const auto it = s.in_flight.find(sequence);
  if (it == s.in_flight.end()) return;
  s.finished.push_back(fmt::format("{}({})", it->second.verb, sequence));
  if (s.finished.size() > 10) s.finished.pop_front();
  s.in_flight.erase(it);
  s.progress.reached(Clock::now());
}

void tell_peers_by(std::function<void()> tell) {
  State& s = state();
  s.tells = std::this_thread::get_id();
  s.tell = std::move(tell);
}

void peers_progressed(Clock::time_point when) {
  state().progress.reached(when);
}

}  // namespace upmoe::watchdog

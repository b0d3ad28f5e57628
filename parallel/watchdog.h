#pragma once
// The watchdog that ends a hang, and what counts as progress.

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "kernels/core/check.h"

namespace upmoe {

// A thread that ends the process with kHang (between GPUs kCommunicator) and a message when this rank made no
// progress for `deadline`: names the collective in flight, its sequence number, the ranks it waits for and the
// last collectives. When several ranks notice, the lowest speaks first and ends the job before the others do.
//
// Progress is whatever takes a rank further: an op, a collective begun or ended, a tensor read, a block
// written, on any thread. While the rank's own thread waits in a collective only two things are: the ranks it
// waits for tell that they make progress (signs of life, below), or the collective ends. So a peer that
// evaluates or reads a checkpoint for long is no hang, and one that stopped is.
namespace watchdog {

using Clock = std::chrono::steady_clock;

// On the rank's own thread. `rank` is for the messages.
void start(std::chrono::milliseconds deadline, int rank);
void stop();
// Some progress. Cheap enough for every op; any thread.
void heartbeat();
// Holds the rank's own thread until `done`, which other threads bring about, and lets their heartbeats count.
void wait_until(const std::function<bool()>& done);

// A collective begins; returns its sequence number. `code` is what the process ends with if it does not finish.
std::uint64_t enter(const char* verb, ExitCode code = ExitCode::kHang);
// For whom it has been waiting for a while, in words for the message; as of the last call.
void waiting_for(std::uint64_t sequence, std::string whom);
void leave(std::uint64_t sequence);  // it finished
// Setting up or taking down, together with the peers, from here to the end of the scope; not numbered.
class Phase {
 public:
  explicit Phase(const char* what);
  ~Phase();
  Phase(const Phase&) = delete;
};
// In flight from here to the end of the scope.
struct Watched {
  explicit Watched(const char* verb) : sequence(enter(verb)) {}
  ~Watched() { leave(sequence); }
  Watched(const Watched&) = delete;
  std::uint64_t sequence;
};

// Signs of life. The transport gives a function that tells all peers of this rank's progress; it is called on
// the thread that gave it, from heartbeats there, a few times per deadline. Empty: nobody is told.
void tell_peers_by(std::function<void()> tell);
// All ranks that the collective in flight waits for had made progress at this time.
void peers_progressed(Clock::time_point when);

}  // namespace watchdog

}  // namespace upmoe

#pragma once
// The watchdog that ends a hang.

#include <chrono>
#include <cstdint>
#include <string>

#include "kernels/core/check.h"

namespace upmoe {

// A thread that ends the process with kHang (between GPUs kCommunicator) and a message when no collective and
// no heartbeat has finished for `deadline`: names the collective in flight, its sequence number, the ranks it
// waits for and the last collectives. Communicators report to it. When several ranks notice, the lowest
// speaks first and ends the job before the others do.
namespace watchdog {
void start(std::chrono::milliseconds deadline, int rank);
void stop();
void heartbeat();  // any progress
// A collective begins; returns its sequence number. `code` is what the process ends with if it does not
// finish.
std::uint64_t enter(const char* verb, ExitCode code = ExitCode::kHang);
// For whom it has been waiting for a while, in words for the message; as of the last call.
void waiting_for(std::uint64_t sequence, std::string whom);
void leave(std::uint64_t sequence);  // it finished
}  // namespace watchdog

}  // namespace upmoe

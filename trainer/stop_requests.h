#pragma once
// What signals ask of a training run: a checkpoint, or a checkpoint and the end.

#include <cstdint>

namespace upmoe {

// Signals for this process: SIGUSR1 checkpoint and go on; SIGUSR2, SIGTERM, SIGINT and SIGHUP checkpoint and
// stop. A second one of the latter three, half a second after the first or later, ends at once with 128 + its
// number; sooner it is the same request, which `timeout` and srun hand to a process twice. SIGHUP stays ignored
// where nohup had it ignored. Installed once, before training and as early as that: until then they kill.
void install_signal_handlers();

// What was asked for, as numbers that are summed over up to 65,535 ranks.
constexpr std::int64_t kSaveRequest = 1, kStopRequest = 1 << 16;

// The requests since the last call; a request to stop stays. Any thread.
std::int64_t take_requests();

}  // namespace upmoe

#pragma once
// Starting and stopping the ranks of this job, and the watchdog that ends a hang.

#include <chrono>
#include <memory>
#include <string>

#include "parallel/communicator.h"

namespace upmoe {

// The world of this process for the program's lifetime: MPI when a launcher (mpirun, srun) started several
// ranks, else one rank alone. Refuses (kUsage) when the launcher says several ranks and MPI says one. One per
// process.
class Runtime {
 public:
  Runtime(int* argc, char*** argv);
  ~Runtime();  // finalises MPI, unless an error is under way
  Communicator& world() { return *world_; }
  // The device of this rank for `wish`: cpu, cuda, or auto (GPUs where every rank has one, else the CPU).
  // Each rank of a host gets a GPU of its own; from then on world() also moves tensors on GPUs, over NCCL.
  // Collective. Throws Error(kDevice) on all ranks when a rank cannot have what was asked for, or when two
  // would share a GPU.
  Device choose_device(const std::string& wish);
  // Prints `message` from this rank once and ends the job with `code` on every rank (a signal-safe path on
  // the peers).
  [[noreturn]] void abort(int code, const std::string& message) noexcept;
  // After a PeerError: silent, because the peer prints and ends the job. Finalising MPI meanwhile can hang.
  [[noreturn]] void end_after_peer(int code) noexcept;

 private:
  std::unique_ptr<Communicator> world_;
};

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

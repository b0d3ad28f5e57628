#pragma once
// Starting and stopping the ranks of this job.

#include <chrono>
#include <memory>
#include <string>

#include "configs/run_choices.h"
#include "parallel/communicator.h"
#include "parallel/threads.h"

namespace upmoe {

// The world of this process for the program's lifetime: MPI when a launcher (mpirun, srun) started several ranks,
// else one rank alone. Refuses (kUsage) when the launcher says several ranks and MPI says one. One per process.
class Runtime {
 public:
  // May start the program anew in the same process (threads.h), so this comes before all else that lasts. With
  // a deadline the watchdog runs from here to the end of MPI. The cores of a host are shared among its ranks.
  Runtime(int* argc, char*** argv, std::chrono::milliseconds deadline = std::chrono::milliseconds(0));
  ~Runtime();  // finalises MPI, unless an error is under way
  Communicator& world() { return *world_; }
  const CoreShare& cores() const { return cores_; }
  // The device of this rank for `wish`; kAuto: a GPU where every rank has one, else the CPU.
  // Each rank of a host gets a GPU of its own; from then on world() also moves tensors on GPUs, over NCCL.
  // Collective. Throws Error(kDevice) on all ranks when a rank cannot have what was asked for, or when two
  // would share a GPU.
  Device choose_device(DeviceChoice wish);
  // Prints `message` from this rank once and ends the job with `code` on every rank (a signal-safe
  // path on the peers).
  [[noreturn]] void abort(int code, const std::string& message) noexcept;
  // After a PeerError: silent, because the peer prints and ends the job. Finalising MPI meanwhile can hang.
  [[noreturn]] void end_after_peer(int code) noexcept;

 private:
  std::unique_ptr<Communicator> world_;
  CoreShare cores_;
};

// The rank that a launcher gave this process, 0 without one: for messages before the ranks are up.
int announced_rank();

}  // namespace upmoe

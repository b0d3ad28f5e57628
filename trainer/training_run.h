#pragma once
// A whole run: its directory, resuming, the loop over steps with evaluation, checkpoints and metrics.

#include <string>

#include "configs/run_config.h"
#include "parallel/communicator.h"
#include "trainer/run_record.h"

namespace upmoe {

struct RunOptions {
  Device device;
  bool fresh = false;      // refuse to start when the run directory holds a checkpoint
  std::string cores = {};  // what the ranks of this host compute on, in words for the start of the run
  RunOrigin origin = {};   // for the record of the run
};

// Trains to the end or to a request to stop. Collective; returns the exit status.
int train(const RunConfig& run, Communicator& world, const RunOptions& options);

}  // namespace upmoe

#pragma once
// Ranks as threads of one process. A verb publishes a copy of what it sends; waiting means waiting for
// everybody's copy. Nobody waits for its own copy to be read, so any order of waits is free of deadlock.

#include <functional>

#include "parallel/communicator.h"

namespace upmoe {

// Runs body on `ranks` threads of this process, each with its own communicator. The first exception of any
// rank unblocks the others and is rethrown here.
void run_in_threads(int ranks, const std::function<void(Communicator&)>& body);

}  // namespace upmoe

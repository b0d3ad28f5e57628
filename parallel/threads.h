#pragma once
// How many threads a rank computes with, and how they wait: the cores of a host are shared among its ranks.

#include <string>

#include "parallel/communicator.h"

namespace upmoe {

struct CoreShare {
  int ranks_here = 1;  // on this host
  int threads = 1;     // of this rank
  int cores = 1;  // that this host's ranks may run on together, by their bindings and the container's quota
  int bound_to = 1;       // cores that this rank may run on
  bool is_bound = false;  // to less than the ranks of the host have together
  bool was_told = false;  // OMP_NUM_THREADS says the number
  bool speaks = true;     // the lowest rank of its host
};

// Shares the cores of each host among the ranks that run there, as far as OMP_NUM_THREADS does not say it:
// each rank gets its part of every core it may run on (the launcher's binding), and of the quota of a
// container (cpu.max). From then on the calling thread computes with so many threads. Collective.
CoreShare share_cores(Communicator& world);
// What share_cores() gave this process, for what makes threads of its own; before it, OMP_NUM_THREADS or one.
int rank_threads();
// While it lives, what the calling thread computes is computed by it alone.
class ComputesAlone {
 public:
  ComputesAlone();
  ~ComputesAlone();
  ComputesAlone(const ComputesAlone&) = delete;

 private:
  int before_;
};
// "2 ranks x 4 threads on 8 cores, each rank bound to 4"
std::string describe(const CoreShare& share);
// What is wrong with it, and what to do; empty when all threads have a core.
std::string complaint(const CoreShare& share);

// Processors that a container's quota grants; 0: no quota. `root` and `own` as in control_group.h.
double quota_of_container(const std::string& root, const std::string& own);

// Threads that wait for work look for it for a moment and then sleep, unless OMP_WAIT_POLICY or
// GOMP_SPINCOUNT says otherwise. The OpenMP library reads these once, before main(): so this starts the
// program anew, with one of them set. Before threads, ranks and files are there; returns when there is
// nothing to do.
void bound_spinning();

}  // namespace upmoe

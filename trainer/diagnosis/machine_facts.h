#pragma once
// What a machine's file says beside rates: what is looked up, not timed (configs/machine.h, docs/plan.md).

#include <string>

#include "configs/machine.h"
#include "trainer/diagnosis/findings.h"

namespace upmoe {

// What was measured.
struct MeasuredDevice {
  std::string gpu;       // its name; empty: the host's cores
  double gpu_bytes = 0;  // of its memory
  int cores = 1;         // that the ranks of a host may run on together
};

// Sets name, memory_gb, ranks_per_node and overhead_gb, the last on CPUs alone: what a process has in the host's memory
// says nothing of what it takes of a GPU's, so that on a GPU the key is left out.
void add_facts(Machine& machine, const MeasuredDevice& device, const HostFacts& host,
               const Surroundings& where);

}  // namespace upmoe

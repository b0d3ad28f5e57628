#pragma once
// What ranks send to each other, measured inside of hosts and between them.

#include "trainer/diagnosis/machine_rates.h"

namespace upmoe {

// Fills inside_node and between_nodes of `machine`, as far as there are such links: every host's ranks at the same
// time, then those of one place on each host. Collective; the same result on all.
std::vector<TransferTime> measure_links(Communicator& world, Device device, const Effort& effort,
                                        Machine& machine);

}  // namespace upmoe

#pragma once
// Which ranks share a host.

#include <cstdint>
#include <vector>

#include "parallel/communicator.h"

namespace upmoe {

// Of every rank a number that the processes of one host share, and no others. Collective.
std::vector<std::int64_t> hosts_of(Communicator& world);
// One number of each rank, by rank. Collective.
std::vector<std::int64_t> gather(Communicator& world, std::int64_t mine);

}  // namespace upmoe

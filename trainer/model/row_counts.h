#pragma once
// How many rows the ranks of a group have for each other, before they exchange them.

#include <cstdint>
#include <vector>

#include "parallel/communicator.h"

namespace upmoe {

// counts_C (int32, on the device) of every rank of `group`, one behind the other, on the host; zeros on the dry device,
// where nobody counted. Collective; the host waits for the stream.
std::vector<std::int32_t> counts_of_all(Exec& ex, Communicator& group, ConstTensorView counts_C);

}  // namespace upmoe

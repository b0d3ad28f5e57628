#pragma once
// How many rows the ranks of a group have for each other, before they exchange them.

#include "kernels/ops/transfer.h"
#include "parallel/communicator.h"

namespace upmoe {

// counts_C (int32, on the device) of every rank of `group`, one behind the other, set out for the host: [ranks, C] when
// they are there. Collective; the host waits for nothing.
void send_counts(Exec& ex, Communicator& group, ConstTensorView counts_C, ops::Landing& counts);

}  // namespace upmoe

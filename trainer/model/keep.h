#pragma once
// What a block keeps from forward to backward under each Recompute: memory for work.

#include "configs/run_choices.h"

namespace upmoe {

// Of a feed-forward network: what backward finds kept.
struct Keep {
  bool rows = true;  // the experts' input; a dense network's own is its caller's
  bool gate_up = true, hidden = true;
};
struct KeepOfKinds {
  Keep dense, routed;  // dense networks and shared experts; routed experts
};
// The norms are the block's own affair; kFfn and kBlock make whole halves of the block again, from what these keep
// meanwhile.
KeepOfKinds keep_of(Recompute recompute);

}  // namespace upmoe

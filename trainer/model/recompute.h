#pragma once
// What a block keeps from forward to backward, and what backward makes again: memory for work.

#include <string>

namespace upmoe {

// What backward makes again instead of keeping it, each with what stands before it: kSwiglu, what lies
// between the two products of a feed-forward network (an elementwise op) and the rows that experts are given
// (copies, where one rank has all experts); kRoutedUp, the experts' first product; kUp, that of dense
// networks and of the shared expert; kFfn, the feed-forward half; kBlock, everything but the block's input.
enum class Recompute { kNone, kSwiglu, kRoutedUp, kUp, kFfn, kBlock };
Recompute recompute_from(const std::string& name);

// Of a feed-forward network: what backward finds kept.
struct Keep {
  bool rows = true;  // the experts' input; a dense network's own is its caller's
  bool gate_up = true, hidden = true;
};
struct KeepOfKinds {
  Keep dense, routed;  // dense networks and shared experts; routed experts
};
// kFfn and kBlock make whole halves of the block again, from what these keep meanwhile.
KeepOfKinds keep_of(Recompute recompute);

}  // namespace upmoe

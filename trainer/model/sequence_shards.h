#pragma once
// Tensor parallelism with the sequence divided. Between layers each tp rank holds t of a micro-batch's T tokens,
// in rank order (t = T / tp); attention, feed-forward and head work on all T with their share of the weights, so
// a layer begins by gathering tokens and ends by adding up the ranks' partial results, each rank keeping its own
// tokens. The backward of one is the other. A group of one rank moves nothing and copies nothing.

#include "kernels/core/exec.h"
#include "parallel/communicator.h"

namespace upmoe {

// All ranks' tokens under way; both calls belong to one ScratchScope of the caller. Collective over tp.
class GatheredTokens {
 public:
  GatheredTokens(Exec& ex, Communicator& tp, ConstTensorView x_tD);
  ConstTensorView finish();  // x_TD

 private:
  ConstTensorView x_TD_;
  Pending pending_;
};
ConstTensorView gather_tokens(Exec& ex, Communicator& tp, ConstTensorView x_tD);

// Of the tokens pick_N (int32) of all T, which tp divides, this rank's n in out_nD. Collective over tp.
void pick_tokens(Exec& ex, Communicator& tp, TensorView out_nD, ConstTensorView x_tD, ConstTensorView pick_N);

// A sum over the tp ranks of which each keeps its tokens: write partial_TD, then reduce(). In one
// ScratchScope of the caller. Collective over tp.
class PartialSum {
 public:
  PartialSum(Exec& ex, Communicator& tp, TensorView y_tD);
  TensorView partial_TD() const { return partial_TD_; }
  void reduce(Exec& ex);  // y_tD is overwritten

 private:
  Communicator& tp_;
  TensorView y_tD_, partial_TD_;
};

}  // namespace upmoe

#pragma once
// Rows to the ranks that hold their experts, and back. The same two verbs serve forward and backward: the
// backward of to_experts is from_experts of the gradient, and the other way round.

#include <vector>

#include "kernels/ops/expert_rows.h"
#include "parallel/communicator.h"
#include "trainer/model/expert_shares.h"
#include "trainer/model/layer.h"

namespace upmoe {

// How this micro-batch's rows travel. Built once; forward, backward and recomputation share it. Views live in
// the arena given to make_plan.
struct DispatchPlan {
  std::int64_t tokens = 0, choices = 0;  // S, of pieces, of each token
  TensorView order_N;                    // i32: position sorted by piece -> flat (token, choice)
  TensorView slot_TS;                    // i32: its inverse; -1 for a choice that is none
  TensorView regroup_R, ungroup_R;       // i32: expert-major row -> arrival row, and back; empty when ep is 1
  std::vector<std::int64_t> send_rows, recv_rows;                  // per rank of the exchange
  std::vector<std::int64_t> expert_offsets;                        // of the local experts, e+1
  TensorView offset_e1;                                            // i32: the same on the device
  std::int64_t sent() const { return order_N.rows(); }             // N
  std::int64_t received() const { return expert_offsets.back(); }  // R
  ExpertRows expert_rows() const { return {offset_e1, expert_offsets}; }
};

// The choices by piece, in scratch memory; those of the experts themselves when nothing cuts their width.
ConstTensorView piece_choices(Exec& ex, const ExpertShares& shares, int ranks, ConstTensorView index_TK);

// index_TS: the tokens' choices of pieces, -1 for none. Collective over `exchange`, whose ranks hold the
// pieces of `map`: gathers the counts, the one point where the host waits for the device.
DispatchPlan make_plan(Exec& ex, Communicator& exchange, ConstTensorView index_TS, const PieceMap& map,
                       Arena& keep);

// Rows under way to the experts: from start until finish the buffers lie in the scratch arena, so both calls
// belong to one ScratchScope of the caller.
class ToExperts {
 public:
  // Sends row order_N[i] / divisor of `rows` for every i: divisor S for token rows, S / K for rows per choice
  // of an expert.
  ToExperts(Exec& ex, Communicator& exchange, const DispatchPlan& plan, ConstTensorView rows,
            std::int64_t divisor);
  void finish(Exec& ex, TensorView out_R);  // expert-major

 private:
  const DispatchPlan& plan_;
  ConstTensorView rows_;
  std::int64_t divisor_;
  TensorView arrived_R_;
  Pending pending_;
};

// Rows under way back to their tokens' rank.
class FromExperts {
 public:
  FromExperts(Exec& ex, Communicator& exchange, const DispatchPlan& plan, ConstTensorView rows_R);
  ConstTensorView finish();  // rows_N in sorted order; read with slot_TS

 private:
  TensorView ungrouped_R_, arrived_N_;
  ConstTensorView direct_;
  Pending pending_;
};

}  // namespace upmoe

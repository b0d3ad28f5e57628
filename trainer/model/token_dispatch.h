#pragma once
// Rows to the ranks that hold their experts, and back. The same two verbs serve forward and backward: the
// backward of to_experts is from_experts of the gradient, and the other way round.

#include <vector>

#include "parallel/communicator.h"
#include "trainer/model/expert_shares.h"
#include "trainer/model/layer.h"

namespace upmoe {

// How this micro-batch's rows travel. Built once; forward, backward and recomputation share it. Views live in
// the arena given to make_plan.
struct DispatchPlan {
  std::int64_t tokens = 0, top_k = 0, etp = 1;
  TensorView order_N;               // i32: position sorted by piece -> flat (token, k, part)
  TensorView slot_TS;               // i32: its inverse, S = K * etp
  TensorView regroup_R, ungroup_R;  // i32: expert-major row -> arrival row, and back; empty when ep is 1
  std::vector<std::int64_t> send_rows, recv_rows;                  // per rank of the exchange
  std::vector<std::int64_t> expert_offsets;                        // of the local experts, e+1
  std::int64_t sent() const { return tokens * top_k * etp; }       // N
  std::int64_t received() const { return expert_offsets.back(); }  // R
};

// Collective over `exchange`, the ranks along ep and etp: gathers the counts, the one point where the host
// waits for the device.
DispatchPlan make_plan(Exec& ex, Communicator& exchange, ConstTensorView index_TK, const ExpertShares& shares,
                       Arena& keep);

// Rows under way to the experts: from start until finish the buffers lie in the scratch arena, so both calls
// belong to one ScratchScope of the caller.
class ToExperts {
 public:
  // Sends row order_N[i] / divisor of `rows` for every i: divisor K * etp for token rows, etp for rows per
  // choice.
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

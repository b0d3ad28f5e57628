#pragma once
// Rows to the ranks that hold their experts, and back. The same two ways serve forward and backward: the backward of
// rows to experts is their gradients from experts, and the other way round.

#include <vector>

#include "kernels/core/exec.h"
#include "kernels/ops/expert_rows.h"
#include "trainer/model/expert_shares.h"
#include "trainer/model/rows_under_way.h"

namespace upmoe {

// How this micro-batch's rows travel. Built once; forward, backward and recomputation share it. Views live in
// the arena given to make_plan.
struct DispatchPlan {
  std::int64_t choices = 0, pieces = 1;  // K slots of a token, pieces of the expert in each; S = K * pieces
  TensorView order_N;                    // i32: position sorted by piece -> flat (token, choice, piece)
  TensorView slot_TS;                    // i32: its inverse; -1 for a choice that is none
  TensorView regroup_R, ungroup_R;  // i32: expert-major row -> arrival row, and back; no shape on one rank
  std::vector<std::int64_t> send_rows, recv_rows;                  // per rank of the exchange
  std::vector<std::int64_t> expert_offsets;                        // of the local experts, e+1
  TensorView offset_e1;                                            // i32: the same on the device
  std::int64_t tokens() const { return slot_TS.shape[0]; }         // T
  std::int64_t sent() const { return order_N.rows(); }             // N
  std::int64_t received() const { return expert_offsets.back(); }  // R
  ExpertRows expert_rows() const { return {offset_e1, expert_offsets}; }
  bool moves() const { return regroup_R.shape.rank > 0; }
  // In sorted order, from rows that are there once for a token, or once for each of its choices.
  ops::PickedRows of_tokens(ConstTensorView rows_TX) const { return {rows_TX, order_N, choices * pieces}; }
  ops::PickedRows of_choices(ConstTensorView rows_TKX) const { return {rows_TKX, order_N, pieces}; }
};

// The choices by piece, in scratch memory; those of the experts themselves when nothing cuts their width.
ConstTensorView piece_choices(Exec& ex, const ExpertShares& shares, int ranks, ConstTensorView index_TK);

// index_TS: the tokens' choices of pieces, `pieces` for each choice of an expert, -1 for none. Collective over
// `exchange`, whose ranks hold the pieces of `map`: gathers the counts, the one point where the host waits for the
// device. `taken`: as in Choices.
DispatchPlan make_plan(Exec& ex, Communicator& exchange, ConstTensorView index_TS, std::int64_t pieces,
                       const PieceMap& map, Arena& keep, std::int64_t taken = -1);

// Expert-major, once waited for.
RowsUnderWay to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                        const ops::PickedRows& rows);
// Rows of the experts in sorted order at their tokens' rank, once waited for; read with slot_TS.
RowsUnderWay from_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan, ConstTensorView rows_R);

}  // namespace upmoe

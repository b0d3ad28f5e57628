#pragma once
// Rows to the ranks that hold their experts, and back. The same two ways serve forward and backward: the backward of
// rows to experts is their gradients from experts, and the other way round.

#include <vector>

#include "kernels/core/exec.h"
#include "kernels/ops/expert_rows.h"
#include "kernels/ops/transfer.h"
#include "trainer/model/choices.h"
#include "trainer/model/expert_shares.h"
#include "trainer/model/rows_under_way.h"

namespace upmoe {

// How this micro-batch's rows travel. Built once; forward, backward and recomputation share it. Views live in
// the arena given to begin_plan.
struct DispatchPlan {
  std::int64_t choices = 0, pieces = 1;  // K slots of a token, pieces of the expert in each; S = K * pieces
  TensorView order_N;                    // i32: position sorted by piece -> flat (token, choice, piece)
  TensorView slot_TS;                    // i32: its inverse; -1 for a choice that is none
  TensorView regroup_R, ungroup_R;  // i32: expert-major row -> arrival row, and back; no shape on one rank
  TensorView offset_e1;             // i32: where the local experts' rows begin
  std::vector<std::int64_t> send_rows, recv_rows;  // per rank of the exchange
  std::vector<std::int64_t> expert_offsets;        // offset_e1 where the host knows it, else empty
  bool gaps = false;                               // some of order_N are none, how many only the counts say
  std::int64_t taken = -1;                         // choices that are not, in a rehearsal (Choices)
  std::int64_t rows = -1;                          // R; -1: not known yet
  bool whole() const { return rows >= 0; }
  std::int64_t tokens() const { return slot_TS.shape[0]; }  // T
  std::int64_t sent() const { return order_N.rows(); }      // N
  std::int64_t received() const { return rows; }            // R
  ExpertRows expert_rows() const { return {offset_e1, expert_offsets}; }
  bool moves() const { return regroup_R.shape.rank > 0; }
  // In sorted order, from rows that are there once for a token, or once for each of its choices.
  ops::PickedRows of_tokens(ConstTensorView rows_TX) const { return {rows_TX, order_N, choices * pieces}; }
  ops::PickedRows of_choices(ConstTensorView rows_TKX) const { return {rows_TKX, order_N, pieces}; }
};

// The tokens' choices of pieces of experts, `pieces` for each choice of an expert; with gaps -1 for none. taken: as in
// Choices, of experts.
struct PieceChoices {
  ConstTensorView index_TS;
  std::int64_t pieces = 1;
  bool gaps = false;
  std::int64_t taken = -1;
};
// In scratch memory; the choices of the experts themselves when nothing cuts their width.
PieceChoices piece_choices(Exec& ex, const ExpertShares& shares, int ranks, const Choices& choices);

// Collective over `exchange`, whose ranks hold the pieces of `map`: sorts the choices and exchanges the counts, which
// set out for the host. A rank alone, and without gaps, knows how many rows there are: its plan is whole, all of it on
// the device.
DispatchPlan begin_plan(Exec& ex, Communicator& exchange, const PieceChoices& choices, const PieceMap& map,
                        Arena& keep, ops::Landing& counts);
// The rest of the plan, from the counts. The host waits for them alone, not for what the device was given since; not at
// all where the plan is whole.
void complete_plan(Exec& ex, const Communicator& exchange, DispatchPlan& plan, const PieceMap& map,
                   Arena& keep, ops::Landing& counts);
// For products that take an expert's rows as numbers of the host: offset_e1 sets out for it; it becomes expert_offsets.
void send_offsets(Exec& ex, const DispatchPlan& plan, ops::Landing& offsets);
void read_offsets(Exec& ex, DispatchPlan& plan, ops::Landing& offsets);

// Expert-major, once waited for. The rows are laid out in sorted order, and then sent: the first needs no counts.
TensorView lay_out(Exec& ex, const ops::PickedRows& rows);
// They arrive in memory of `into`.
RowsUnderWay send_to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                             ConstTensorView sent_N, Arena& into);
RowsUnderWay to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                        const ops::PickedRows& rows, Arena& into);
// Rows of the experts in sorted order at their tokens' rank, once waited for; read with slot_TS.
RowsUnderWay from_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan, ConstTensorView rows_R);

}  // namespace upmoe

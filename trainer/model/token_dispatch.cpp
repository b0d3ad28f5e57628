#include "trainer/model/token_dispatch.h"

#include <algorithm>
#include <numeric>

#include "kernels/ops/routing.h"
#include "kernels/ops/transfer.h"
#include "trainer/model/row_counts.h"

namespace upmoe {

namespace {

Shape rows_shape(std::int64_t rows, const Shape& like) {
  Shape s = like;
  s.dim[0] = rows;
  return s;
}

// counts_PE[p*E + e]: rows that rank p of the group sends to expert e. On the dry device nobody counted; the
// rehearsal takes a balanced router, of which these are `rows`.
std::vector<std::int32_t> read_counts(Exec& ex, ops::Landing& counts, std::int64_t P, std::int64_t E,
                                      std::int64_t rows) {
  const ConstTensorView arrived_PE = counts.wait();
  std::vector<std::int32_t> counts_PE(static_cast<std::size_t>(P * E));
  if (ex.device.type != DeviceType::kDry) {
    std::copy_n(arrived_PE.as<std::int32_t>(), P * E, counts_PE.begin());
  } else {
    for (std::int64_t i = 0; i < P * E; ++i)
      counts_PE[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(balanced(rows, E, i % E).size());
  }
  return counts_PE;
}

// Arrival order is rank-major, then expert; the experts want expert-major, then rank, which is global token order.
void regroup(Exec& ex, DispatchPlan& plan, const std::vector<std::int32_t>& counts_PE, std::int64_t P,
             std::int64_t E, Range local) {
  std::vector<std::int64_t> arrival{0}, grouped;
  std::vector<std::int64_t> next(plan.expert_offsets.begin(), plan.expert_offsets.end() - 1);
  for (std::int64_t p = 0; p < P; ++p)
    for (std::int64_t e = local.begin; e < local.end; ++e) {
      const std::int64_t rows = counts_PE[static_cast<std::size_t>(p * E + e)];
      std::int64_t& at = next[static_cast<std::size_t>(e - local.begin)];
      grouped.push_back(at);
      arrival.push_back(arrival.back() + rows);
      at += rows;
    }
  ops::regroup_runs(ex, plan.regroup_R, plan.ungroup_R, arrival, grouped);
}

}  // namespace

PieceChoices piece_choices(Exec& ex, const ExpertShares& shares, int ranks, const Choices& choices) {
  const ConstTensorView& index_TK = choices.index_TK;
  if (shares.etp == 1) return {index_TK, 1, choices.gaps, choices.taken};
  const std::vector<std::int32_t> numbers = shares.numbers(ranks);
  const Shape shape{shares.num_experts, shares.etp};
  TensorView piece_EP = ex.scratch->take(shape, DType::kI32, "numbers of the pieces of experts");
  ops::upload(ex, piece_EP, host_view(numbers.data(), shape));
  TensorView index_TS =
      ex.scratch->take({index_TK.shape[0], index_TK.shape[1] * shares.etp}, DType::kI32, "choices of pieces");
  ops::expand_choices(ex, index_TS, index_TK, piece_EP);
  return {index_TS, shares.etp, choices.gaps, choices.taken};
}

namespace {

void count_rows(DispatchPlan& plan, const Communicator& exchange, const PieceMap& map,
                const std::vector<std::int32_t>& counts_PE) {
  const std::int64_t P = exchange.size(), E = map.pieces();
  const Range local = map.of_rank[static_cast<std::size_t>(exchange.rank())];
  plan.expert_offsets.assign(static_cast<std::size_t>(local.size() + 1), 0);
  for (int p = 0; p < P; ++p) {
    const Range theirs = map.of_rank[static_cast<std::size_t>(p)];
    std::int64_t send = 0, recv = 0;
    for (std::int64_t e = theirs.begin; e < theirs.end; ++e)
      send += counts_PE[static_cast<std::size_t>(exchange.rank() * E + e)];
    for (std::int64_t e = local.begin; e < local.end; ++e) {
      const std::int64_t n = counts_PE[static_cast<std::size_t>(p * E + e)];
      recv += n;
      plan.expert_offsets[static_cast<std::size_t>(e - local.begin + 1)] += n;
    }
    plan.send_rows.push_back(send);
    plan.recv_rows.push_back(recv);
  }
  std::partial_sum(plan.expert_offsets.begin(), plan.expert_offsets.end(), plan.expert_offsets.begin());
}

}  // namespace

DispatchPlan begin_plan(Exec& ex, Communicator& exchange, const PieceChoices& choices, const PieceMap& map,
                        Arena& keep, ops::Landing& counts) {
  const ConstTensorView& index_TS = choices.index_TS;
  DispatchPlan plan;
  plan.choices = index_TS.shape[1] / choices.pieces;
  plan.pieces = choices.pieces;
  plan.gaps = choices.gaps;
  plan.taken = choices.taken;
  plan.order_N = keep.take({index_TS.elements()}, DType::kI32, "dispatch order");
  plan.slot_TS = keep.take(index_TS.shape, DType::kI32, "dispatch slots");
  const std::int64_t E = map.pieces(), local = map.of_rank[static_cast<std::size_t>(exchange.rank())].size();
  plan.offset_e1 = keep.take({local + 1}, DType::kI32, "where the experts' rows begin");
  ScratchScope scope(*ex.scratch);
  TensorView counts_E = ex.scratch->take({E}, DType::kI32, "rows per piece");
  ops::sort_by_expert(ex, plan.order_N, plan.slot_TS, counts_E, index_TS);
  if (exchange.size() == 1 && !plan.gaps) {
    ops::row_offsets(ex, plan.offset_e1, counts_E);
    plan.rows = plan.sent();
  } else {
    send_counts(ex, exchange, counts_E, counts);
  }
  return plan;
}

void complete_plan(Exec& ex, const Communicator& exchange, DispatchPlan& plan, const PieceMap& map,
                   Arena& keep, ops::Landing& counts) {
  if (plan.whole()) return;
  // A row that came to this node has its share of the choices here.
  const std::int64_t balanced_rows =
      plan.taken >= 0 ? plan.taken * plan.pieces : plan.sent() / std::min(map.nodes, plan.choices);
  const std::vector<std::int32_t> counts_PE =
      read_counts(ex, counts, exchange.size(), map.pieces(), balanced_rows);
  count_rows(plan, exchange, map, counts_PE);
  const std::vector<std::int32_t> offsets(plan.expert_offsets.begin(), plan.expert_offsets.end());
  ops::upload(ex, plan.offset_e1, host_view(offsets.data(), plan.offset_e1.shape));
  plan.order_N =
      plan.order_N.rows(0, std::accumulate(plan.send_rows.begin(), plan.send_rows.end(), std::int64_t{0}));
  plan.rows = plan.expert_offsets.back();
  if (exchange.size() > 1) {
    plan.regroup_R = keep.take({plan.received()}, DType::kI32, "regroup");
    plan.ungroup_R = keep.take({plan.received()}, DType::kI32, "ungroup");
    regroup(ex, plan, counts_PE, exchange.size(), map.pieces(),
            map.of_rank[static_cast<std::size_t>(exchange.rank())]);
  }
}

void send_offsets(Exec& ex, const DispatchPlan& plan, ops::Landing& offsets) {
  if (plan.whole() && plan.expert_offsets.empty()) offsets.start(ex, plan.offset_e1);
}

void read_offsets(Exec& ex, DispatchPlan& plan, ops::Landing& offsets) {
  if (!plan.expert_offsets.empty()) return;
  const std::int64_t experts = plan.offset_e1.elements() - 1;
  const ConstTensorView arrived_e1 = offsets.wait();
  plan.expert_offsets.push_back(0);
  for (std::int64_t e = 0; e < experts; ++e)  // on the dry device a balanced router's
    plan.expert_offsets.push_back(ex.device.type == DeviceType::kDry ? balanced(plan.rows, experts, e).end
                                                                     : arrived_e1.as<std::int32_t>()[e + 1]);
}

// The way of the rows, and back. gather and regroup are both permutations, each applied while rows are copied anyway:
//
//   x_TD --order_N--> by expert --all_to_all--> by rank, expert --regroup_R--> by expert --> experts
//   y_TD <--slot_TS-- by expert <--all_to_all-- by rank, expert <--ungroup_R-- by expert <-- experts
TensorView lay_out(Exec& ex, const ops::PickedRows& rows) {
  const ConstTensorView& from = rows.from_XD;
  TensorView sent_N =
      ex.scratch->take(rows_shape(rows.index_R.rows(), from.shape), from.dtype, "rows to the experts");
  ops::gather_rows(ex, sent_N, from, rows.index_R, rows.divisor);
  return sent_N;
}

RowsUnderWay send_to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                             ConstTensorView sent_N, Arena& into) {
  TensorView arrived_R =
      into.take(rows_shape(plan.received(), sent_N.shape), sent_N.dtype, "rows from all ranks");
  return {exchange.all_to_all_rows(arrived_R, plan.recv_rows, sent_N, plan.send_rows, ex),
          {arrived_R, plan.regroup_R, 1}};
}

RowsUnderWay to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                        const ops::PickedRows& rows, Arena& into) {
  if (!plan.moves()) return {{}, rows};  // sorted order is expert-major already
  return send_to_experts(ex, exchange, plan, lay_out(ex, rows), into);
}

RowsUnderWay from_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                          ConstTensorView rows_R) {
  if (!plan.moves()) return {{}, {rows_R, {}, 1}};
  TensorView ungrouped_R = ex.scratch->take(rows_R.shape, rows_R.dtype, "rows leaving the experts");
  TensorView arrived_N =
      ex.scratch->take(rows_shape(plan.sent(), rows_R.shape), rows_R.dtype, "rows back at their tokens");
  ops::gather_rows(ex, ungrouped_R, rows_R, plan.ungroup_R, 1);
  return {exchange.all_to_all_rows(arrived_N, plan.send_rows, ungrouped_R, plan.recv_rows, ex),
          {arrived_N, {}, 1}};
}

}  // namespace upmoe

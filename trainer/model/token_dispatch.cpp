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
std::vector<std::int32_t> gather_counts(Exec& ex, Communicator& exchange, TensorView counts_E,
                                        std::int64_t rows) {
  std::vector<std::int32_t> counts_PE = counts_of_all(ex, exchange, counts_E);
  if (ex.device.type != DeviceType::kDry) return counts_PE;
  const std::int64_t E = counts_E.shape[0];
  for (std::int64_t i = 0; i < exchange.size() * E; ++i)
    counts_PE[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(balanced(rows, E, i % E).size());
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

ConstTensorView piece_choices(Exec& ex, const ExpertShares& shares, int ranks, ConstTensorView index_TK) {
  if (shares.etp == 1) return index_TK;
  const std::vector<std::int32_t> numbers = shares.numbers(ranks);
  const Shape shape{shares.num_experts, shares.etp};
  TensorView piece_EP = ex.scratch->take(shape, DType::kI32, "numbers of the pieces of experts");
  ops::upload(ex, piece_EP, host_view(numbers.data(), shape));
  TensorView index_TS =
      ex.scratch->take({index_TK.shape[0], index_TK.shape[1] * shares.etp}, DType::kI32, "choices of pieces");
  ops::expand_choices(ex, index_TS, index_TK, piece_EP);
  return index_TS;
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

DispatchPlan make_plan(Exec& ex, Communicator& exchange, ConstTensorView index_TS, std::int64_t pieces,
                       const PieceMap& map, Arena& keep, std::int64_t taken) {
  DispatchPlan plan;
  plan.choices = index_TS.shape[1] / pieces;
  plan.pieces = pieces;
  plan.order_N = keep.take({index_TS.elements()}, DType::kI32, "dispatch order");
  plan.slot_TS = keep.take(index_TS.shape, DType::kI32, "dispatch slots");
  ScratchScope scope(*ex.scratch);
  TensorView counts_E = ex.scratch->take({map.pieces()}, DType::kI32, "rows per piece");
  ops::sort_by_expert(ex, plan.order_N, plan.slot_TS, counts_E, index_TS);
  // A row that came to this node has its share of the choices here.
  const std::int64_t balanced_rows =
      taken >= 0 ? taken * pieces : plan.sent() / std::min(map.nodes, plan.choices);
  // Here the host waits for the device: it has to know how many rows come, and for which experts.
  const std::vector<std::int32_t> counts_PE = gather_counts(ex, exchange, counts_E, balanced_rows);
  count_rows(plan, exchange, map, counts_PE);
  const std::vector<std::int32_t> offsets(plan.expert_offsets.begin(), plan.expert_offsets.end());
  const Shape one_more{static_cast<std::int64_t>(offsets.size())};
  plan.offset_e1 = keep.take(one_more, DType::kI32, "where the experts' rows begin");
  ops::upload(ex, plan.offset_e1, host_view(offsets.data(), one_more));
  plan.order_N =
      plan.order_N.rows(0, std::accumulate(plan.send_rows.begin(), plan.send_rows.end(), std::int64_t{0}));
  if (exchange.size() > 1) {
    plan.regroup_R = keep.take({plan.received()}, DType::kI32, "regroup");
    plan.ungroup_R = keep.take({plan.received()}, DType::kI32, "ungroup");
    regroup(ex, plan, counts_PE, exchange.size(), map.pieces(),
            map.of_rank[static_cast<std::size_t>(exchange.rank())]);
  }
  return plan;
}

// The way of the rows, and back. gather and regroup are both permutations, each applied while rows are copied anyway:
//
//   x_TD --order_N--> by expert --all_to_all--> by rank, expert --regroup_R--> by expert --> experts
//   y_TD <--slot_TS-- by expert <--all_to_all-- by rank, expert <--ungroup_R-- by expert <-- experts
RowsUnderWay to_experts(Exec& ex, Communicator& exchange, const DispatchPlan& plan,
                        const ops::PickedRows& rows) {
  if (!plan.moves()) return {{}, rows};  // sorted order is expert-major already
  const ConstTensorView& from = rows.from_XD;
  TensorView sent_N =
      ex.scratch->take(rows_shape(plan.sent(), from.shape), from.dtype, "rows to the experts");
  TensorView arrived_R =
      ex.scratch->take(rows_shape(plan.received(), from.shape), from.dtype, "rows from all ranks");
  ops::gather_rows(ex, sent_N, from, rows.index_R, rows.divisor);
  return {exchange.all_to_all_rows(arrived_R, plan.recv_rows, sent_N, plan.send_rows, ex),
          {arrived_R, plan.regroup_R, 1}};
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

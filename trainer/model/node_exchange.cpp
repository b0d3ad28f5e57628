#include "trainer/model/node_exchange.h"

#include <algorithm>
#include <numeric>

#include "kernels/ops/routing.h"
#include "trainer/model/expert_shares.h"
#include "trainer/model/row_counts.h"

namespace upmoe {

namespace {

TensorView take_rows(Arena& arena, std::int64_t rows, ConstTensorView like, const char* what) {
  return arena.take({rows, like.shape[1]}, like.dtype, what);
}

std::int64_t sum_of(const std::vector<std::int64_t>& rows) {
  return std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
}

// counts_MM[m * M + n]: rows that the rank of node m sends to that of node n. On the dry device nobody counted: every
// token asks for every node that has experts, or for as many as it has choices.
std::vector<std::int32_t> balanced_counts(const Choices& choices,
                                          const std::vector<std::int64_t>& node_begin) {
  const std::size_t M = node_begin.size() - 1;
  const std::int64_t nodes = nodes_with_experts(node_begin),
                     each = choices.index_TK.shape[0] * std::min(nodes, choices.of_token()) / nodes;
  std::vector<std::int32_t> counts_MM(M * M);
  for (std::size_t i = 0; i < M * M; ++i)
    if (node_begin[i % M] < node_begin[i % M + 1]) counts_MM[i] = static_cast<std::int32_t>(each);
  return counts_MM;
}

// How many rows go to and come from each node.
void count_rows(Exec& ex, const NodeGroups& groups, ops::Landing& counts, std::vector<std::int32_t> all_MM,
                NodePlan& plan) {
  const auto M = static_cast<std::int64_t>(groups.across->size());
  const ConstTensorView arrived_MM = counts.wait();
  if (ex.device.type != DeviceType::kDry) std::copy_n(arrived_MM.as<std::int32_t>(), M * M, all_MM.begin());
  const std::int64_t me = groups.across->rank();
  for (std::int64_t m = 0; m < M; ++m) {
    plan.send_rows.push_back(all_MM[static_cast<std::size_t>(me * M + m)]);
    plan.recv_rows.push_back(all_MM[static_cast<std::size_t>(m * M + me)]);
  }
}

}  // namespace

NodePlan make_node_plan(Exec& ex, const NodeGroups& groups, const Choices& choices,
                        const std::vector<std::int64_t>& node_begin, Arena& keep, ops::Landing& counts) {
  const ConstTensorView &index_TK = choices.index_TK, &weight_TK = choices.weight_TK;
  const std::int64_t T = index_TK.shape[0], K = index_TK.shape[1], M = groups.across->size();
  NodePlan plan;
  plan.order_X = keep.take({T * M}, DType::kI32, "rows to other nodes");
  plan.slot_TM = keep.take({T, M}, DType::kI32, "rows of tokens on nodes");
  ScratchScope scope(*ex.scratch);
  TensorView counts_M = ex.scratch->take({M}, DType::kI32, "rows per node");
  ops::group_by_node(ex, plan.order_X, plan.slot_TM, counts_M, index_TK, node_begin);
  send_counts(ex, *groups.across, counts_M, counts);
  count_rows(ex, groups, counts, balanced_counts(choices, node_begin), plan);
  // Kept for the most there could be, a row for every token and node, before the counts were known; used are the first.
  plan.order_X = plan.order_X.rows(0, sum_of(plan.send_rows));

  const std::int64_t X = plan.order_X.rows(), A = sum_of(plan.recv_rows);
  plan.index_AK = keep.take({A, K}, DType::kI32, "choices of arrived rows");
  plan.weight_AK = keep.take({A, K}, DType::kF32, "weights of arrived rows");
  TensorView index_XK = ex.scratch->take({X, K}, DType::kI32, "choices of rows to other nodes");
  TensorView weight_XK = ex.scratch->take({X, K}, DType::kF32, "weights of rows to other nodes");
  ops::node_choices(ex, index_XK, weight_XK, {plan.order_X, plan.send_rows, node_begin}, index_TK, weight_TK);
  // The choices go along with their rows, so that the other node can route them on; both messages are under way at
  // once.
  Pending indices =
      groups.across->all_to_all_rows(plan.index_AK, plan.recv_rows, index_XK, plan.send_rows, ex);
  Pending weights =
      groups.across->all_to_all_rows(plan.weight_AK, plan.recv_rows, weight_XK, plan.send_rows, ex);
  indices.wait();
  weights.wait();
  return plan;
}

RowsUnderWay to_nodes(Exec& ex, const NodeGroups& groups, const NodePlan& plan, ConstTensorView rows_TX,
                      Arena& into) {
  TensorView sent_X = take_rows(*ex.scratch, plan.order_X.rows(), rows_TX, "rows to other nodes");
  TensorView arrived_A = take_rows(into, plan.arrived(), rows_TX, "rows from other nodes");
  ops::gather_rows(ex, sent_X, rows_TX, plan.order_X, 1);
  return {groups.across->all_to_all_rows(arrived_A, plan.recv_rows, sent_X, plan.send_rows, ex),
          {arrived_A, {}, 1}};
}

RowsUnderWay from_nodes(Exec& ex, const NodeGroups& groups, const NodePlan& plan, ConstTensorView rows_AX) {
  TensorView arrived_X = take_rows(*ex.scratch, plan.order_X.rows(), rows_AX, "rows back from other nodes");
  return {groups.across->all_to_all_rows(arrived_X, plan.send_rows, rows_AX, plan.recv_rows, ex),
          {arrived_X, {}, 1}};
}

}  // namespace upmoe

#pragma once
// The first and last leg of the exchange of expert rows between nodes: a token's row crosses to another node
// once, however many of its experts are there, and the experts' outputs come back added up, one row for each
// pair of a token and a node. Inside a node the rows then go on as in token_dispatch.h. The results are those
// of the flat exchange but for the order of one sum: a token's experts are added up node by node.
//
// Ranks of the exchange are nodes x ranks of a node, the latter innermost. `across` joins the ranks with one
// place on each node, `inside` the ranks of a node.

#include <vector>

#include "kernels/ops/transfer.h"
#include "trainer/model/choices.h"
#include "trainer/model/rows_under_way.h"

namespace upmoe {

struct NodeGroups {
  Communicator *across = nullptr, *inside = nullptr;  // null: every row goes straight to its rank
  explicit operator bool() const { return across != nullptr; }
};

// How this micro-batch's rows cross. Views live in the arena given to make_node_plan.
struct NodePlan {
  TensorView order_X;              // i32: row to send -> token
  TensorView slot_TM;              // i32: row of token t on node m, or -1
  TensorView index_AK, weight_AK;  // of the rows that arrived here: choices on this node, or -1
  std::vector<std::int64_t> send_rows, recv_rows;             // per node
  std::int64_t arrived() const { return index_AK.shape[0]; }  // A
};

// node_begin: the first expert of each node and their number behind. Collective over groups.across; the host waits for
// the counts, which come by way of `counts`.
NodePlan make_node_plan(Exec& ex, const NodeGroups& groups, const Choices& choices,
                        const std::vector<std::int64_t>& node_begin, Arena& keep, ops::Landing& counts);

// Rows of tokens at the nodes of their experts, [A, X], once waited for.
// They arrive in memory of `into`.
RowsUnderWay to_nodes(Exec& ex, const NodeGroups& groups, const NodePlan& plan, ConstTensorView rows_TX,
                      Arena& into);
// Rows back at their tokens' rank, [rows to other nodes, X], once waited for; read with slot_TM.
RowsUnderWay from_nodes(Exec& ex, const NodeGroups& groups, const NodePlan& plan, ConstTensorView rows_AX);

}  // namespace upmoe

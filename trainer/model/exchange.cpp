#include "trainer/model/exchange.h"

namespace upmoe {

RowsUnderWay Exchange::send_weights(Exec& ex, const ExchangePlan& plan) const {
  const ConstTensorView weight_N1 = plan.weight_TK.reshape({plan.weight_TK.elements(), 1});
  return to_experts(ex, meeting_, plan.dispatch, plan.dispatch.of_choices(weight_N1), *ex.scratch);
}

void Exchange::receive_weights(Exec& ex, TensorView weight_R1, RowsUnderWay& weights) const {
  const ops::PickedRows& arrived = weights.wait();
  ops::gather_rows(ex, weight_R1, arrived.from_XD, arrived.index_R, arrived.divisor);
}

RowsUnderWay Exchange::send_back(Exec& ex, const ExchangePlan& plan, ConstTensorView rows_R) const {
  return from_experts(ex, meeting_, plan.dispatch, rows_R);
}

namespace {

// [T, K] from one value for each of the rows that were sent: those of a choice's pieces are added up.
TensorView sum_of_choices(Exec& ex, const DispatchPlan& plan, ConstTensorView rows_N1) {
  const std::int64_t T = plan.tokens(), K = plan.choices;
  TensorView sum_TK = ex.scratch->take({T, K}, DType::kF32, "router weight gradient");
  // An expert that is cut in pieces computes a part of the hidden layer on each; the weight's gradient is the sum of
  // theirs.
  ops::gather_sum_rows(ex, sum_TK.reshape({T * K, 1}), rows_N1, plan.slot_TS.reshape({T * K, plan.pieces}));
  return sum_TK;
}

class FlatExchange final : public Exchange {
 public:
  FlatExchange(const ExpertShares& shares, Communicator& ranks)
      : Exchange(ranks), shares_(shares), map_(whole_map(shares, ranks.size())) {}

  ExchangePlan plan(Exec& ex, const Choices& choices, Arena& keep) const override {
    ScratchScope scope(*ex.scratch);
    ExchangePlan plan;
    plan.dispatch =
        begin_plan(ex, meeting_, piece_choices(ex, shares_, meeting_.size(), choices), map_, keep, counts_);
    plan.weight_TK = choices.weight_TK;
    plan.in_place = meeting_.size() == 1;
    return plan;
  }
  RowsUnderWay set_out(Exec& ex, ExchangePlan& plan, ConstTensorView x_TD, Arena& keep,
                       Arena& into) const override {
    DispatchPlan& dispatch = plan.dispatch;
    // The device lays out the rows while the host waits for the counts.
    TensorView sent_N;
    if (!dispatch.whole() && !dispatch.gaps) sent_N = lay_out(ex, dispatch.of_tokens(x_TD));
    complete_plan(ex, meeting_, dispatch, map_, keep, counts_);
    if (sent_N.given()) return send_to_experts(ex, meeting_, dispatch, sent_N, into);
    return to_experts(ex, meeting_, dispatch, dispatch.of_tokens(x_TD), into);
  }
  RowsUnderWay send(Exec& ex, const ExchangePlan& plan, ConstTensorView x_TD) const override {
    return to_experts(ex, meeting_, plan.dispatch, plan.dispatch.of_tokens(x_TD), *ex.scratch);
  }
  ops::PickedRows receive(Exec&, const ExchangePlan&, RowsUnderWay& rows) const override {
    return rows.wait();
  }
  void add_back(Exec& ex, const ExchangePlan& plan, TensorView y_TD, RowsUnderWay& rows,
                const SumOnto& onto) const override {
    ops::gather_sum_rows(ex, y_TD, rows.wait().from_XD, plan.dispatch.slot_TS, onto);
  }
  TensorView weights_back(Exec& ex, const ExchangePlan& plan, RowsUnderWay& rows) const override {
    return sum_of_choices(ex, plan.dispatch, rows.wait().from_XD);
  }

 private:
  ExpertShares shares_;
  PieceMap map_;
};

// Two stages, so that a token crosses between nodes once for each node that has an expert of its, not once for each
// expert:
//
//   rank i, node a  -- across: rows for node b -->  rank i, node b  -- inside: rows for experts -->  rank j, node b
//                   <-- their sum, one row a token --                <-- rows of the experts --
//
// The node's ranks see the tokens that arrived there, with their choices among the node's experts.
class NodeExchange final : public Exchange {
 public:
  NodeExchange(const ExpertShares& shares, int ranks, const NodeGroups& nodes)
      : Exchange(*nodes.inside),
        begins_(node_begins(shares, ranks, nodes.inside->size())),
        map_(node_map(shares, ranks, nodes.inside->size(), nodes.across->rank())),
        nodes_(nodes) {}

  ExchangePlan plan(Exec& ex, const Choices& choices, Arena& keep) const override {
    ExchangePlan plan;
    plan.nodes = make_node_plan(ex, nodes_, choices, begins_, keep, counts_);
    plan.dispatch =
        begin_plan(ex, meeting_, {plan.nodes.index_AK, 1, true, choices.taken}, map_, keep, counts_);
    plan.weight_TK = plan.nodes.weight_AK;
    return plan;
  }
  RowsUnderWay set_out(Exec& ex, ExchangePlan& plan, ConstTensorView x_TD, Arena& keep,
                       Arena& into) const override {
    // Across nodes, before it is known where they go from there; a rank alone on its node picks from what arrived.
    RowsUnderWay rows = to_nodes(ex, nodes_, plan.nodes, x_TD, meeting_.size() == 1 ? into : *ex.scratch);
    complete_plan(ex, meeting_, plan.dispatch, map_, keep, counts_);
    rows.into = &into;
    return rows;
  }
  RowsUnderWay send(Exec& ex, const ExchangePlan& plan, ConstTensorView x_TD) const override {
    return to_nodes(ex, nodes_, plan.nodes, x_TD, *ex.scratch);
  }
  ops::PickedRows receive(Exec& ex, const ExchangePlan& plan, RowsUnderWay& rows) const override {
    Arena& into = rows.into != nullptr ? *rows.into : *ex.scratch;
    return to_experts(ex, meeting_, plan.dispatch, plan.dispatch.of_tokens(rows.wait().from_XD), into).wait();
  }
  // Their sum crosses, not the rows.
  void add_back(Exec& ex, const ExchangePlan& plan, TensorView y_TD, RowsUnderWay& rows,
                const SumOnto& onto) const override {
    const ConstTensorView rows_ND = rows.wait().from_XD;
    TensorView sum_AD =
        ex.scratch->take({plan.nodes.arrived(), y_TD.shape[1]}, rows_ND.dtype, "sums of a node");
    ops::gather_sum_rows(ex, sum_AD, rows_ND, plan.dispatch.slot_TS);
    RowsUnderWay home = from_nodes(ex, nodes_, plan.nodes, sum_AD);
    ops::gather_sum_rows(ex, y_TD, home.wait().from_XD, plan.nodes.slot_TM, onto);
  }
  TensorView weights_back(Exec& ex, const ExchangePlan& plan, RowsUnderWay& rows) const override {
    const TensorView here_AK = sum_of_choices(ex, plan.dispatch, rows.wait().from_XD);
    RowsUnderWay home = from_nodes(ex, nodes_, plan.nodes, here_AK);
    TensorView whole_TK = ex.scratch->take({plan.nodes.slot_TM.shape[0], plan.dispatch.choices}, DType::kF32,
                                           "router weight gradient");
    ops::gather_sum_rows(ex, whole_TK, home.wait().from_XD, plan.nodes.slot_TM);
    return whole_TK;
  }

 private:
  std::vector<std::int64_t> begins_;
  PieceMap map_;
  NodeGroups nodes_;
};

}  // namespace

std::unique_ptr<const Exchange> make_exchange(const ExpertShares& shares, Communicator& ranks,
                                              const NodeGroups& nodes) {
  if (nodes) return std::make_unique<NodeExchange>(shares, ranks.size(), nodes);
  return std::make_unique<FlatExchange>(shares, ranks);
}

}  // namespace upmoe

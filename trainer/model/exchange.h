#pragma once
// The exchange of rows between the ranks that share a mixture's experts: tokens' rows to the experts that they chose,
// and what those make of them back to the tokens. Everything that starts a transfer returns while it is under way, so
// that the caller can compute meanwhile; the verbs are collective over the ranks and in one order on all of them.
//
// Two implementations: every row straight to its rank (token_dispatch.h), or to another node once however many of its
// experts are there (node_exchange.h).

#include <memory>

#include "kernels/ops/routing.h"
#include "trainer/model/choices.h"
#include "trainer/model/node_exchange.h"
#include "trainer/model/token_dispatch.h"

namespace upmoe {

// How one micro-batch's rows travel, there and back, forward and backward.
struct ExchangePlan {
  NodePlan nodes;             // of the exchange by nodes, else empty
  DispatchPlan dispatch;      // where rows meet their experts: among all ranks, or those of the node
  ConstTensorView weight_TK;  // of the tokens that the dispatch sees
  bool in_place = false;      // nothing moves: receive() picks from the very rows that send() was given
  std::int64_t received() const { return dispatch.received(); }  // R
  ExpertRows expert_rows() const { return dispatch.expert_rows(); }
};

class Exchange {
 public:
  virtual ~Exchange() = default;

  // Forward begins with the plan, most of it on the device, and with the tokens' rows, which set out as soon as the
  // counts are there: set_out() completes the plan in `keep`. What receive() then picks from is x_TD or lies in
  // `into`.
  virtual ExchangePlan plan(Exec& ex, const Choices& choices, Arena& keep) const = 0;
  virtual RowsUnderWay set_out(Exec& ex, ExchangePlan& plan, ConstTensorView x_TD, Arena& keep,
                               Arena& into) const = 0;
  // For experts that are computed one by one: expert_rows().on_host. read_offsets() waits for what send_offsets(),
  // behind plan(), sent on its way; where the host has counted itself, both have nothing to do.
  void send_offsets(Exec& ex, const ExchangePlan& plan) const {
    upmoe::send_offsets(ex, plan.dispatch, counts_);
  }
  void read_offsets(Exec& ex, ExchangePlan& plan) const { upmoe::read_offsets(ex, plan.dispatch, counts_); }

  // One row of each token to all of its experts: dy in backward, as x in forward.
  virtual RowsUnderWay send(Exec& ex, const ExchangePlan& plan, ConstTensorView x_TD) const = 0;
  virtual ops::PickedRows receive(Exec& ex, const ExchangePlan& plan,
                                  RowsUnderWay& rows) const = 0;  // [R, D]
  // The choices' weights to their experts.
  RowsUnderWay send_weights(Exec& ex, const ExchangePlan& plan) const;
  void receive_weights(Exec& ex, TensorView weight_R1, RowsUnderWay& weights) const;

  // One row of each of the experts' rows back to its token: y in forward, dx and the weights' gradients in backward.
  RowsUnderWay send_back(Exec& ex, const ExchangePlan& plan, ConstTensorView rows_R) const;
  // The adjoint of receive: y_TD = the sum of each token's rows, added to `onto`.
  virtual void add_back(Exec& ex, const ExchangePlan& plan, TensorView y_TD, RowsUnderWay& rows,
                        const SumOnto& onto) const = 0;
  // The adjoint of receive_weights: [T, K] in scratch memory, 0 where a slot is none.
  virtual TensorView weights_back(Exec& ex, const ExchangePlan& plan, RowsUnderWay& rows) const = 0;

 protected:
  explicit Exchange(Communicator& meeting) : meeting_(meeting) {}
  Communicator& meeting_;        // the ranks among which rows meet their experts
  mutable ops::Landing counts_;  // of the forward that runs
};

// `ranks`: those along ep and etp. With `nodes` rows go by way of nodes; etp is 1 then.
std::unique_ptr<const Exchange> make_exchange(const ExpertShares& shares, Communicator& ranks,
                                              const NodeGroups& nodes);

}  // namespace upmoe

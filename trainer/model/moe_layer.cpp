#include "trainer/model/moe_layer.h"

namespace upmoe {

void MoeLayer::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, ConstTensorView residual_TD,
                       const RouterBalance& balance, Arena& keep, Saved& saved) const {
  // Computed all at once, experts pick their rows where they lie, backward as well; one by one they make a copy of them
  // for themselves, and take the host's word for how many each has.
  const bool one_by_one = !experts.fuses(ex);
  saved.choices = router->forward(ex, x_TD, balance, keep, saved.router);
  const Choices& choices = saved.choices;
  saved.plan = exchange->plan(ex, choices, keep);
  ExchangePlan& plan = saved.plan;
  if (one_by_one) exchange->send_offsets(ex, plan);
  ScratchScope scope(*ex.scratch);
  RowsUnderWay x = exchange->set_out(ex, plan, choices.rows_of(x_TD), keep, one_by_one ? *ex.scratch : keep),
               weights = exchange->send_weights(ex, plan);
  SumOnto onto{.residual_TD = residual_TD};
  if (shared) {  // while the rows travel
    shared->forward(ex, y_TD, x_TD, keep, saved.shared);
    onto.base_TD = y_TD;
  }
  if (one_by_one) exchange->read_offsets(ex, plan);
  const TensorView weight_R1 = keep.take({plan.received(), 1}, DType::kF32, "expert row weights");
  exchange->receive_weights(ex, weight_R1, weights);
  const Experts::Rows rows{.x = exchange->receive(ex, plan, x),
                           .lasting = plan.in_place || !one_by_one,
                           .weight_R1 = weight_R1,
                           .experts = plan.expert_rows()};
  const TensorView y_RD = ex.scratch->take({plan.received(), x_TD.shape[1]}, x_TD.dtype, "expert output");
  experts.forward(ex, y_RD, rows, keep, saved.experts);
  RowsUnderWay y = exchange->send_back(ex, plan, y_RD);
  const RowSums sums = router->outputs(ex, {y_TD, onto}, keep, saved.router);
  exchange->add_back(ex, plan, sums.out, y, sums.onto);
  router->share_outputs(ex, y_TD, balance, saved.router);
}

void MoeLayer::backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const RouterBalance& balance,
                        const Saved& saved) const {
  const ExchangePlan& plan = saved.plan;
  ScratchScope scope(*ex.scratch);
  Router::Saved routed = saved.router;
  RowsUnderWay dy = exchange->send(ex, plan, router->output_gradient(ex, dy_TD, balance, routed));
  SumOnto onto;
  if (shared) {  // while the gradients travel
    shared->backward(ex, dx_TD, dy_TD, saved.shared, &onto.gate);
    onto.base_TD = dx_TD;
  }
  // What forward did not keep is made again while the gradients are on their way, before they are waited for.
  Experts::Backward b = experts.begin_backward(ex, saved.experts);
  experts.backward_rows(ex, b, exchange->receive(ex, plan, dy), saved.experts);
  RowsUnderWay dx = exchange->send_back(ex, plan, b.dx_RD()),
               dweights = exchange->send_back(ex, plan, b.dweight_R1());
  experts.backward_weights(ex, b, saved.experts);  // while the input gradients travel back
  const RowSums sums = router->row_gradient(ex, {dx_TD, onto}, routed);
  exchange->add_back(ex, plan, sums.out, dx, sums.onto);
  router->backward(ex, dx_TD, exchange->weights_back(ex, plan, dweights), balance, routed);
}

}  // namespace upmoe

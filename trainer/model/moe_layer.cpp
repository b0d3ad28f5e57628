#include "trainer/model/moe_layer.h"

#include "kernels/ops/activation.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"

namespace upmoe {

void MoeLayer::route(Exec& ex, ConstTensorView x_TD, Arena& keep, Saved& saved) const {
  const std::int64_t T = x_TD.rows(), E = shares.num_experts, K = top_k;
  saved.x_TD = x_TD;
  saved.probs_TE = keep.take({T, E}, DType::kF32, "router probabilities");
  saved.index_TK = keep.take({T, K}, DType::kI32, "router choices");
  saved.weight_TK = keep.take({T, K}, DType::kF32, "router weights");
  saved.lse_T = keep.take({T}, DType::kF32, "router log-sum-exp");
  if (saved.load_L.shape.rank == 0) saved.load_L = keep.take({3 * E + 1}, DType::kF64, "router load");
  ScratchScope scope(*ex.scratch);
  TensorView logits_TE = ex.scratch->take({T, E}, DType::kF32, "router logits");
  ops::gemm(ex, logits_TE, x_TD, Transpose::kNo, router_ED.value, Transpose::kYes, Accumulate::kOverwrite);
  ops::route_tokens(ex, saved.probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T, logits_TE,
                    renormalize_top_k);
  ops::balance_stats(ex, saved.load_L.rows(0, 3 * E).reshape({3, E}), saved.load_L.rows(3 * E, 3 * E + 1),
                     saved.probs_TE, saved.index_TK, saved.lse_T);
}

void MoeLayer::experts_forward(Exec& ex, TensorView y_RD, ConstTensorView x_RD, Arena& keep,
                               Saved& saved) const {
  const std::int64_t R = saved.plan.received(), G = gate_up_eGD.value.shape[1];
  const DType dtype = y_RD.dtype;
  ScratchScope scope(*ex.scratch);
  const auto memory = [&](bool kept, Shape shape, const char* what) {
    return (kept ? keep : *ex.scratch).take(shape, dtype, what);
  };
  const TensorView gate_up_RG = memory(keep_gate_up, {R, G}, "expert gate and up"),
                   h_RF = memory(keep_hidden, {R, G / 2}, "expert hidden");
  if (keep_gate_up) saved.gate_up_RG = gate_up_RG;
  if (keep_hidden) saved.h_RF = h_RF;
  ops::grouped_gemm_forward(ex, gate_up_RG, x_RD, gate_up_eGD.value, saved.plan.expert_rows());
  const ConstTensorView weight_R = saved.weight_R1.reshape({R});
  ops::swiglu_forward(ex, h_RF, gate_up_RG, &weight_R);
  ops::grouped_gemm_forward(ex, y_RD, h_RF, down_eDF.value, saved.plan.expert_rows());
}

PieceMap MoeLayer::pieces() const {
  if (!nodes) return whole_map(shares, exchange->size());
  return node_map(shares, exchange->size(), nodes.inside->size(), nodes.across->rank());
}

void MoeLayer::plan_dispatch(Exec& ex, Arena& keep, Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  if (nodes) {
    saved.nodes = make_node_plan(ex, nodes, saved.index_TK, saved.weight_TK,
                                 node_begins(shares, exchange->size(), nodes.inside->size()), keep);
    saved.plan = make_plan(ex, group(), saved.nodes.index_AK, pieces(), keep);
  } else {
    saved.plan =
        make_plan(ex, group(), piece_choices(ex, shares, exchange->size(), saved.index_TK), pieces(), keep);
  }
}

// Rows of tokens set out, to other nodes first where there are any; what the caller computes until finish
// hides the longer way.
void MoeLayer::start_dispatch(Exec& ex, ConstTensorView x_TD, std::optional<ToNodes>& crossing,
                              std::optional<ToExperts>& rows, const Saved& saved) const {
  if (nodes) {
    crossing.emplace(ex, nodes, saved.nodes, x_TD);
  } else {
    rows.emplace(ex, group(), saved.plan, x_TD, saved.plan.choices);
  }
}

void MoeLayer::finish_dispatch(Exec& ex, TensorView x_RD, std::optional<ToNodes>& crossing,
                               std::optional<ToExperts>& rows, const Saved& saved) const {
  if (nodes) rows.emplace(ex, group(), saved.plan, crossing->finish(), saved.plan.choices);
  rows->finish(ex, x_RD);
}

void MoeLayer::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const {
  route(ex, x_TD, keep, saved);
  plan_dispatch(ex, keep, saved);
  const std::int64_t R = saved.plan.received(), D = x_TD.shape[1];
  const ConstTensorView chosen = nodes ? saved.nodes.weight_AK : saved.weight_TK;

  ScratchScope scope(*ex.scratch);
  std::optional<ToNodes> crossing;
  std::optional<ToExperts> rows;
  start_dispatch(ex, x_TD, crossing, rows, saved);
  ToExperts weights(ex, group(), saved.plan, chosen.reshape({chosen.elements(), 1}),
                    saved.plan.choices / top_k);
  if (shared) {  // while the rows travel
    shared->forward(ex, y_TD, x_TD, keep, saved.shared);
  } else {
    ops::fill(ex, y_TD, 0.0f);
  }
  const TensorView x_RD = (keeps_rows() ? keep : *ex.scratch).take({R, D}, x_TD.dtype, "expert input");
  if (keeps_rows()) saved.x_RD = x_RD;
  saved.weight_R1 = keep.take({R, 1}, DType::kF32, "expert row weights");
  weights.finish(ex, saved.weight_R1);
  finish_dispatch(ex, x_RD, crossing, rows, saved);

  TensorView y_RD = ex.scratch->take({R, D}, x_TD.dtype, "expert output");
  experts_forward(ex, y_RD, x_RD, keep, saved);
  FromExperts back(ex, group(), saved.plan, y_RD);
  add_to_tokens(ex, y_TD, back.finish(), saved);
}

// y_TD += what the experts returned for each token; between nodes their sum, not their rows.
void MoeLayer::add_to_tokens(Exec& ex, TensorView y_TD, ConstTensorView rows_ND, const Saved& saved) const {
  if (!nodes) {
    ops::gather_sum_rows(ex, y_TD, rows_ND, saved.plan.slot_TS, Accumulate::kAdd);
    return;
  }
  TensorView sum_AD =
      ex.scratch->take({saved.nodes.arrived(), y_TD.shape[1]}, rows_ND.dtype, "sums of a node");
  ops::gather_sum_rows(ex, sum_AD, rows_ND, saved.plan.slot_TS, Accumulate::kOverwrite);
  FromNodes home(ex, nodes, saved.nodes, sum_AD);
  ops::gather_sum_rows(ex, y_TD, home.finish(), saved.nodes.slot_TM, Accumulate::kAdd);
}

// [T*K, 1] from one value per row.
TensorView MoeLayer::weight_gradients(Exec& ex, ConstTensorView rows_N1, const Saved& saved) const {
  const std::int64_t choices = saved.plan.tokens * top_k, parts = saved.plan.choices / top_k;
  TensorView gradient = ex.scratch->take({choices, 1}, DType::kF32, "router weight gradient");
  ops::gather_sum_rows(ex, gradient, rows_N1, saved.plan.slot_TS.reshape({choices, parts}),
                       Accumulate::kOverwrite);
  if (!nodes) return gradient;
  FromNodes home(ex, nodes, saved.nodes, gradient.reshape({saved.nodes.arrived(), top_k}));
  TensorView whole_TK = ex.scratch->take(saved.weight_TK.shape, DType::kF32, "router weight gradient");
  ops::gather_sum_rows(ex, whole_TK, home.finish(), saved.nodes.slot_TM, Accumulate::kOverwrite);
  return whole_TK.reshape({whole_TK.elements(), 1});
}

void MoeLayer::experts_backward(Exec& ex, TensorView dx_RD, TensorView dweight_R1, TensorView dgate_up_RG,
                                ConstTensorView dy_RD, ConstTensorView gate_up_RG, const Saved& saved) const {
  const std::int64_t R = saved.plan.received();
  const ExpertRows expert_rows = saved.plan.expert_rows();
  ScratchScope scope(*ex.scratch);
  TensorView dh_RF = ex.scratch->take({R, gate_up_RG.shape[1] / 2}, dy_RD.dtype, "expert hidden gradient");
  ops::grouped_gemm_dgrad(ex, dh_RF, dy_RD, down_eDF.value, expert_rows);
  const TensorView dweight_R = dweight_R1.reshape({R});
  const ConstTensorView weight_R = saved.weight_R1.reshape({R});
  ops::swiglu_backward(ex, dgate_up_RG, &dweight_R, dh_RF, gate_up_RG, &weight_R);
  ops::grouped_gemm_dgrad(ex, dx_RD, dgate_up_RG, gate_up_eGD.value, expert_rows);
}

// Of backward: kept, or made again in scratch memory.
TensorView MoeLayer::rows(Exec& ex, const Saved& saved) const {
  if (keeps_rows()) return saved.x_RD;
  TensorView x_RD =
      ex.scratch->take({saved.plan.received(), saved.x_TD.shape[1]}, saved.x_TD.dtype, "expert input, again");
  Exec again = not_booked(ex);
  ops::gather_rows(again, x_RD, saved.x_TD, saved.plan.order_N, saved.plan.choices);
  return x_RD;
}

TensorView MoeLayer::gate_up(Exec& ex, ConstTensorView x_RD, const Saved& saved) const {
  if (keep_gate_up) return saved.gate_up_RG;
  TensorView gate_up_RG =
      ex.scratch->take({x_RD.rows(), gate_up_eGD.value.shape[1]}, x_RD.dtype, "expert gate and up, again");
  Exec again = not_booked(ex);
  ops::grouped_gemm_forward(again, gate_up_RG, x_RD, gate_up_eGD.value, saved.plan.expert_rows());
  return gate_up_RG;
}

TensorView MoeLayer::hidden(Exec& ex, ConstTensorView gate_up_RG, const Saved& saved) const {
  if (keep_hidden) return saved.h_RF;
  const std::int64_t R = gate_up_RG.rows();
  TensorView h_RF = ex.scratch->take({R, gate_up_RG.shape[1] / 2}, gate_up_RG.dtype, "expert hidden, again");
  const ConstTensorView weight_R = saved.weight_R1.reshape({R});
  Exec again = not_booked(ex);
  ops::swiglu_forward(again, h_RF, gate_up_RG, &weight_R);
  return h_RF;
}

void MoeLayer::router_backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK,
                               const Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  TensorView dlogits_TE = ex.scratch->take(saved.probs_TE.shape, DType::kF32, "router logit gradient");
  ops::route_tokens_backward(ex, dlogits_TE, dweight_TK, saved.aux_E, saved.z_scale, saved.probs_TE,
                             saved.index_TK, saved.weight_TK, saved.lse_T, renormalize_top_k);
  TensorView narrow_TE = dlogits_TE;
  if (dx_TD.dtype != DType::kF32) {  // products take one dtype
    narrow_TE = ex.scratch->take(dlogits_TE.shape, dx_TD.dtype, "router logit gradient, rounded");
    ops::cast(ex, narrow_TE, dlogits_TE);
  }
  ops::gemm(ex, dx_TD, narrow_TE, Transpose::kNo, router_ED.value, Transpose::kNo, Accumulate::kAdd);
  if (router_ED.wants_grad())
    ops::gemm(ex, router_ED.grad, narrow_TE, Transpose::kYes, saved.x_TD, Transpose::kNo, Accumulate::kAdd);
}

void MoeLayer::backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const {
  const DispatchPlan& plan = saved.plan;
  const std::int64_t R = plan.received(), D = dy_TD.shape[1];
  ScratchScope scope(*ex.scratch);
  std::optional<ToNodes> crossing;
  std::optional<ToExperts> dy_rows;
  start_dispatch(ex, dy_TD, crossing, dy_rows, saved);
  if (shared) {  // while the gradients travel
    shared->backward(ex, dx_TD, dy_TD, saved.shared);
  } else {
    ops::fill(ex, dx_TD, 0.0f);
  }
  TensorView dy_RD = ex.scratch->take({R, D}, dy_TD.dtype, "expert output gradient");
  TensorView dx_RD = ex.scratch->take({R, D}, dy_TD.dtype, "expert input gradient");
  TensorView dweight_R1 = ex.scratch->take({R, 1}, DType::kF32, "expert row weight gradient");
  TensorView dgate_up_RG =
      ex.scratch->take({R, gate_up_eGD.value.shape[1]}, dy_TD.dtype, "expert gate and up gradient");
  const TensorView x_RD = rows(ex, saved), gate_up_RG = gate_up(ex, x_RD, saved);
  finish_dispatch(ex, dy_RD, crossing, dy_rows, saved);
  experts_backward(ex, dx_RD, dweight_R1, dgate_up_RG, dy_RD, gate_up_RG, saved);

  FromExperts dx_rows(ex, group(), plan, dx_RD);
  FromExperts dweights(ex, group(), plan, dweight_R1);
  // While the input gradients travel back:
  if (down_eDF.wants_grad())
    ops::grouped_gemm_wgrad(ex, down_eDF.grad, dy_RD, hidden(ex, gate_up_RG, saved), plan.expert_rows(),
                            Accumulate::kAdd);
  if (gate_up_eGD.wants_grad())
    ops::grouped_gemm_wgrad(ex, gate_up_eGD.grad, dgate_up_RG, x_RD, plan.expert_rows(), Accumulate::kAdd);

  add_to_tokens(ex, dx_TD, dx_rows.finish(), saved);
  const TensorView dweight_TK = weight_gradients(ex, dweights.finish(), saved);
  router_backward(ex, dx_TD, dweight_TK.reshape(saved.weight_TK.shape), saved);
}

}  // namespace upmoe

#include "trainer/model/router.h"

#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"

namespace upmoe {

namespace {

// As a product takes it beside a weight of this dtype: rows of another one are copied.
ConstTensorView in_dtype(Exec& ex, DType dtype, ConstTensorView rows, const char* what) {
  if (rows.dtype == dtype) return rows;
  const TensorView copy = ex.scratch->take(rows.shape, dtype, what);
  ops::cast(ex, copy, rows);
  return copy;
}

class SoftmaxRouter final : public Router {
 public:
  SoftmaxRouter(const Param& weight_ED, std::int64_t top_k, bool renormalize)
      : weight_ED_(weight_ED), top_k_(top_k), renormalize_(renormalize) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const std::int64_t T = x_TD.rows(), E = weight_ED_.value.shape[0], K = top_k_;
    saved.x_TD = x_TD;
    saved.probs_TE = keep.take({T, E}, DType::kF32, "router probabilities");
    saved.index_TK = keep.take({T, K}, DType::kI32, "router choices");
    saved.weight_TK = keep.take({T, K}, DType::kF32, "router weights");
    saved.lse_T = keep.take({T}, DType::kF32, "router log-sum-exp");
    ScratchScope scope(*ex.scratch);
    TensorView logits_TE = ex.scratch->take({T, E}, DType::kF32, "router logits");
    ops::gemm(ex, logits_TE, {in_dtype(ex, weight_ED_.value.dtype, x_TD, "router input, widened")},
              {weight_ED_.value, Transpose::kYes}, Accumulate::kOverwrite);
    ops::route_tokens(ex, saved.probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T, logits_TE,
                      renormalize_);
    if (balance.load)
      ops::balance_stats(ex, balance.load.stats_3E(), balance.load.z_1(), saved.probs_TE, saved.index_TK,
                         saved.lse_T);
    return {saved.index_TK, saved.weight_TK};
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    ScratchScope scope(*ex.scratch);
    TensorView dlogits_TE = ex.scratch->take(saved.probs_TE.shape, DType::kF32, "router logit gradient");
    ops::route_tokens_backward(ex, dlogits_TE, dweight_TK, balance.aux_E, balance.z_scale,
                               {saved.probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T}, renormalize_);
    const DType dtype = weight_ED_.value.dtype;
    const ConstTensorView dy_TE = in_dtype(ex, dtype, dlogits_TE, "router logit gradient, rounded");
    add_input_gradient(ex, dx_TD, dy_TE);
    if (weight_ED_.wants_grad())
      ops::gemm(ex, weight_ED_.grad, {dy_TE, Transpose::kYes},
                {in_dtype(ex, dtype, saved.x_TD, "router input, widened again")}, Accumulate::kAdd);
  }

 private:
  void add_input_gradient(Exec& ex, TensorView dx_TD, ConstTensorView dy_TE) const {
    const DType dtype = weight_ED_.value.dtype;
    if (dx_TD.dtype == dtype) {
      ops::gemm(ex, dx_TD, {dy_TE}, {weight_ED_.value}, Accumulate::kAdd);
      return;
    }
    ScratchScope scope(*ex.scratch);
    const TensorView wide_TD = ex.scratch->take(dx_TD.shape, dtype, "router input gradient, widened");
    ops::cast(ex, wide_TD, dx_TD);
    ops::gemm(ex, wide_TD, {dy_TE}, {weight_ED_.value}, Accumulate::kAdd);
    ops::cast(ex, dx_TD, wide_TD);
  }

  Param weight_ED_;
  std::int64_t top_k_;
  bool renormalize_;
};

}  // namespace

std::unique_ptr<const Router> make_softmax_router(const Param& weight_ED, std::int64_t top_k,
                                                  bool renormalize) {
  return std::make_unique<SoftmaxRouter>(weight_ED, top_k, renormalize);
}

}  // namespace upmoe

#include "trainer/model/sigmoid_router.h"

namespace upmoe {

namespace {

class SigmoidRouter final : public Router {
 public:
  SigmoidRouter(const RouterProduct& product, ConstTensorView bias_E, std::int64_t top_k,
                const SigmoidRule& rule)
      : product_(product), bias_E_(bias_E), top_k_(top_k), rule_(rule) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const std::int64_t T = x_TD.rows(), E = product_.experts(), K = top_k_;
    saved.x_TD = x_TD;
    saved.logits_TE = keep.take({T, E}, DType::kF32, "router logits");
    saved.index_TK = keep.take({T, K}, DType::kI32, "router choices");
    saved.weight_TK = keep.take({T, K}, DType::kF32, "router weights");
    saved.lse_T = keep.take({T}, DType::kF32, "router log-sum-exp");
    ScratchScope scope(*ex.scratch);
    const TensorView probs_TE = ex.scratch->take({T, E}, DType::kF32, "router probabilities");
    product_.forward(ex, saved.logits_TE, x_TD);
    ops::route_sigmoid(ex, {probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T}, saved.logits_TE, bias_E_,
                       rule_);
    if (balance.load) balance.load.count(ex, {probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T});
    return {saved.index_TK, saved.weight_TK};
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    ScratchScope scope(*ex.scratch);
    TensorView dlogits_TE = ex.scratch->take(saved.logits_TE.shape, DType::kF32, "router logit gradient");
    ops::route_sigmoid_backward(ex, dlogits_TE, balance.with_weight_gradient(ex, dweight_TK, saved.index_TK),
                                balance.terms, {saved.logits_TE, saved.index_TK, saved.lse_T}, rule_);
    product_.backward(ex, dx_TD, dlogits_TE, saved.x_TD);
  }

 private:
  RouterProduct product_;
  ConstTensorView bias_E_;
  std::int64_t top_k_;
  SigmoidRule rule_;
};

}  // namespace

std::unique_ptr<const Router> make_sigmoid_router(const RouterProduct& product, ConstTensorView bias_E,
                                                  std::int64_t top_k, const SigmoidRule& rule) {
  return std::make_unique<SigmoidRouter>(product, bias_E, top_k, rule);
}

}  // namespace upmoe

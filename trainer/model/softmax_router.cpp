#include "trainer/model/softmax_router.h"

#include "kernels/ops/routing.h"

namespace upmoe {

namespace {

class SoftmaxRouter final : public Router {
 public:
  SoftmaxRouter(const RouterProduct& product, std::int64_t top_k, bool renormalize)
      : product_(product), top_k_(top_k), renormalize_(renormalize) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const std::int64_t T = x_TD.rows(), E = product_.experts(), K = top_k_;
    saved.x_TD = x_TD;
    saved.probs_TE = keep.take({T, E}, DType::kF32, "router probabilities");
    saved.index_TK = keep.take({T, K}, DType::kI32, "router choices");
    saved.weight_TK = keep.take({T, K}, DType::kF32, "router weights");
    saved.lse_T = keep.take({T}, DType::kF32, "router log-sum-exp");
    ScratchScope scope(*ex.scratch);
    TensorView logits_TE = ex.scratch->take({T, E}, DType::kF32, "router logits");
    product_.forward(ex, logits_TE, x_TD);
    ops::route_tokens(ex, saved.probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T, logits_TE,
                      renormalize_);
    if (balance.load) balance.load.count(ex, routes(saved));
    return {saved.index_TK, saved.weight_TK};
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    ScratchScope scope(*ex.scratch);
    TensorView dlogits_TE = ex.scratch->take(saved.probs_TE.shape, DType::kF32, "router logit gradient");
    ops::route_tokens_backward(ex, dlogits_TE, balance.with_weight_gradient(ex, dweight_TK, saved.index_TK),
                               balance.terms, routes(saved), renormalize_);
    product_.backward(ex, dx_TD, dlogits_TE, saved.x_TD);
  }

 private:
  static Routes routes(const Saved& s) { return {s.probs_TE, s.index_TK, s.weight_TK, s.lse_T}; }

  RouterProduct product_;
  std::int64_t top_k_;
  bool renormalize_;
};

}  // namespace

std::unique_ptr<const Router> make_softmax_router(const RouterProduct& product, std::int64_t top_k,
                                                  bool renormalize) {
  return std::make_unique<SoftmaxRouter>(product, top_k, renormalize);
}

}  // namespace upmoe

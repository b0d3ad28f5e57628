#include "trainer/model/noisy_router.h"

#include "kernels/ops/noisy_routing.h"
#include "trainer/model/softmax_router.h"

namespace upmoe {
namespace {

class NoisyRouter final : public Router {
 public:
  NoisyRouter(const RouterProduct& product, const RouterProduct& noise, std::int64_t top_k, bool renormalize)
      : product_(product),
        noise_(noise),
        top_k_(top_k),
        renormalize_(renormalize),
        quiet_(make_softmax_router(product, top_k, renormalize)) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    if (!balance.tokens) return quiet_->forward(ex, x_TD, balance, keep, saved);
    const Shape TE{x_TD.rows(), product_.experts()}, TK{x_TD.rows(), top_k_};
    saved.x_TD = x_TD;
    saved.logits_TE = keep.take(TE, DType::kF32, "router logits");
    saved.scale_TE = keep.take(TE, DType::kF32, "router noise scales");
    saved.noisy_TE = keep.take(TE, DType::kF32, "noisy router logits");
    saved.probs_TE = keep.take(TE, DType::kF32, "router probabilities");
    saved.index_TK = keep.take(TK, DType::kI32, "router choices");
    saved.weight_TK = keep.take(TK, DType::kF32, "router weights");
    saved.lse_T = keep.take({x_TD.rows()}, DType::kF32, "router log-sum-exp");
    ScratchScope scope(*ex.scratch);
    product_.forward(ex, saved.logits_TE, x_TD);
    noise_.forward(ex, saved.scale_TE, x_TD);
    ops::add_router_noise(ex, saved.noisy_TE, saved.logits_TE, saved.scale_TE, draws(balance));
    ops::route_tokens(ex, saved.probs_TE, saved.index_TK, saved.weight_TK, saved.lse_T, saved.noisy_TE,
                      renormalize_);
    if (balance.load) balance.load.count(ex, routes(saved));
    if (balance.load.chance_E.given()) ops::noisy_load(ex, balance.load.chance_E, noisy(saved));
    return {saved.index_TK, saved.weight_TK};
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    if (!balance.tokens) return quiet_->backward(ex, dx_TD, dweight_TK, balance, saved);
    ScratchScope scope(*ex.scratch);
    const Shape TE = saved.logits_TE.shape;
    const TensorView dnoisy_TE = ex.scratch->take(TE, DType::kF32, "noisy router logits' gradient"),
                     dlogits_TE = ex.scratch->take(TE, DType::kF32, "router logit gradient"),
                     dscale_TE = ex.scratch->take(TE, DType::kF32, "router noise scales' gradient");
    ops::route_tokens_backward(ex, dnoisy_TE, balance.with_weight_gradient(ex, dweight_TK, saved.index_TK),
                               balance.terms, routes(saved), renormalize_);
    ops::add_router_noise_backward(ex, dlogits_TE, dscale_TE, {dnoisy_TE, balance.chance_gradient_E},
                                   noisy(saved), draws(balance));
    product_.backward(ex, dx_TD, dlogits_TE, saved.x_TD);
    noise_.backward(ex, dx_TD, dscale_TE, saved.x_TD);
  }

 private:
  static TokenDraws draws(const RouterBalance& balance) { return balance.tokens.draws("router.noise"); }
  static Routes routes(const Saved& s) { return {s.probs_TE, s.index_TK, s.weight_TK, s.lse_T}; }
  static NoisyLogits noisy(const Saved& s) { return {s.logits_TE, s.scale_TE, s.noisy_TE, s.index_TK}; }

  RouterProduct product_, noise_;
  std::int64_t top_k_;
  bool renormalize_;
  std::unique_ptr<const Router> quiet_;
};

}  // namespace

std::unique_ptr<const Router> make_noisy_router(const RouterProduct& product, const RouterProduct& noise,
                                                std::int64_t top_k, bool renormalize) {
  return std::make_unique<NoisyRouter>(product, noise, top_k, renormalize);
}

}  // namespace upmoe

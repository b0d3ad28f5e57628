#include "trainer/model/jitter_router.h"

#include <utility>

#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"

namespace upmoe {
namespace {

class JitterRouter final : public Router {
 public:
  JitterRouter(std::unique_ptr<const Router> router, float amount)
      : router_(std::move(router)), amount_(amount) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    if (!balance.tokens) return router_->forward(ex, x_TD, balance, keep, saved);
    const TensorView jittered_TD = keep.take(x_TD.shape, x_TD.dtype, "router input with jitter");
    ops::jitter(ex, jittered_TD, x_TD, draws(balance), amount_, Accumulate::kOverwrite);
    return router_->forward(ex, jittered_TD, balance, keep, saved);
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    if (!balance.tokens) return router_->backward(ex, dx_TD, dweight_TK, balance, saved);
    ScratchScope scope(*ex.scratch);
    const TensorView djittered_TD = ex.scratch->take(dx_TD.shape, dx_TD.dtype, "jittered input's gradient");
    ops::fill(ex, djittered_TD, 0.0f);
    router_->backward(ex, djittered_TD, dweight_TK, balance, saved);
    ops::jitter(ex, dx_TD, djittered_TD, draws(balance), amount_, Accumulate::kAdd);
  }

 private:
  static TokenDraws draws(const RouterBalance& balance) { return balance.tokens.draws("router.jitter"); }

  std::unique_ptr<const Router> router_;
  float amount_;
};

}  // namespace

std::unique_ptr<const Router> make_jitter_router(std::unique_ptr<const Router> router, double amount) {
  return std::make_unique<JitterRouter>(std::move(router), static_cast<float>(amount));
}

}  // namespace upmoe

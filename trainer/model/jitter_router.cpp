#include "trainer/model/jitter_router.h"

#include <utility>

#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"
#include "trainer/model/router_around.h"

namespace upmoe {
namespace {

class JitterRouter final : public RouterAround {
 public:
  JitterRouter(std::unique_ptr<const Router> router, float amount)
      : RouterAround(std::move(router)), amount_(amount) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    if (!balance.tokens) return RouterAround::forward(ex, x_TD, balance, keep, saved);
    const TensorView jittered_TD = keep.take(x_TD.shape, x_TD.dtype, "router input with jitter");
    ops::jitter(ex, jittered_TD, x_TD, draws(balance), amount_, Accumulate::kOverwrite);
    return RouterAround::forward(ex, jittered_TD, balance, keep, saved);
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    if (!balance.tokens) return RouterAround::backward(ex, dx_TD, dweight_TK, balance, saved);
    ScratchScope scope(*ex.scratch);
    const TensorView djittered_TD = ex.scratch->take(dx_TD.shape, dx_TD.dtype, "jittered input's gradient");
    ops::fill(ex, djittered_TD, 0.0f);
    RouterAround::backward(ex, djittered_TD, dweight_TK, balance, saved);
    ops::jitter(ex, dx_TD, djittered_TD, draws(balance), amount_, Accumulate::kAdd);
  }

 private:
  static TokenDraws draws(const RouterBalance& balance) { return balance.tokens.draws("router.jitter"); }

  float amount_;
};

}  // namespace

std::unique_ptr<const Router> make_jitter_router(std::unique_ptr<const Router> router, double amount) {
  return std::make_unique<JitterRouter>(std::move(router), static_cast<float>(amount));
}

}  // namespace upmoe

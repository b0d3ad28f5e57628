#include "trainer/model/scaled_router.h"

#include <utility>

#include "kernels/ops/pointwise.h"
#include "trainer/model/router_around.h"

namespace upmoe {
namespace {

class ScaledRouter final : public RouterAround {
 public:
  ScaledRouter(std::unique_ptr<const Router> router, float factor)
      : RouterAround(std::move(router)), factor_(factor) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    Choices choices = RouterAround::forward(ex, x_TD, balance, keep, saved);
    choices.weight_TK = scaled(ex, choices.weight_TK, keep);
    return choices;
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    ScratchScope scope(*ex.scratch);
    RouterAround::backward(ex, dx_TD, scaled(ex, dweight_TK, *ex.scratch), balance, saved);
  }

 private:
  // A copy: the router goes on from its own weights in backward.
  TensorView scaled(Exec& ex, ConstTensorView weight_TK, Arena& arena) const {
    const TensorView out_TK = arena.take(weight_TK.shape, weight_TK.dtype, "scaled router weights");
    ops::cast(ex, out_TK, weight_TK);
    ops::scale(ex, out_TK, factor_);
    return out_TK;
  }

  float factor_;
};

}  // namespace

std::unique_ptr<const Router> make_scaled_router(std::unique_ptr<const Router> router, double factor) {
  return std::make_unique<ScaledRouter>(std::move(router), static_cast<float>(factor));
}

}  // namespace upmoe

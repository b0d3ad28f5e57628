#include "trainer/model/second_choice_router.h"

#include <utility>

#include "kernels/ops/router_draws.h"
#include "trainer/model/router_around.h"

namespace upmoe {
namespace {

// A choice that was not drawn has the gradient 0, and the router's own choices are in Saved: its backward is right as
// it is.
class SecondChoiceRouter final : public RouterAround {
 public:
  using RouterAround::RouterAround;

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const Choices all = RouterAround::forward(ex, x_TD, balance, keep, saved);
    if (!balance.tokens) return all;
    const TensorView kept_TK = keep.take(all.index_TK.shape, DType::kI32, "router choices that were drawn");
    ops::draw_second(ex, kept_TK, all.index_TK, all.weight_TK, balance.tokens.draws("router.second_choice"));
    return {kept_TK, all.weight_TK, true};
  }
};

}  // namespace

std::unique_ptr<const Router> make_second_choice_router(std::unique_ptr<const Router> router) {
  return std::make_unique<SecondChoiceRouter>(std::move(router));
}

}  // namespace upmoe

#include "trainer/model/second_choice_router.h"

#include <utility>

#include "kernels/ops/router_draws.h"

namespace upmoe {
namespace {

class SecondChoiceRouter final : public Router {
 public:
  explicit SecondChoiceRouter(std::unique_ptr<const Router> router) : router_(std::move(router)) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const Choices all = router_->forward(ex, x_TD, balance, keep, saved);
    if (!balance.tokens) return all;
    const TensorView kept_TK = keep.take(all.index_TK.shape, DType::kI32, "router choices that were drawn");
    ops::draw_second(ex, kept_TK, all.index_TK, all.weight_TK, balance.tokens.draws("router.second_choice"));
    return {kept_TK, all.weight_TK, true};
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    router_->backward(ex, dx_TD, dweight_TK, balance, saved);
  }

 private:
  std::unique_ptr<const Router> router_;
};

}  // namespace

std::unique_ptr<const Router> make_second_choice_router(std::unique_ptr<const Router> router) {
  return std::make_unique<SecondChoiceRouter>(std::move(router));
}

}  // namespace upmoe

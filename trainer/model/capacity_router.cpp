#include "trainer/model/capacity_router.h"

#include <utility>

#include "configs/expert_use.h"
#include "kernels/ops/capacity.h"
#include "kernels/ops/pointwise.h"
#include "trainer/model/router_around.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {
namespace {

// What is dropped has the gradient 0, and the router's own choices are in Saved: its backward is right as it is.
class CapacityRouter final : public RouterAround {
 public:
  CapacityRouter(std::unique_ptr<const Router> router, const CapacityForm& form)
      : RouterAround(std::move(router)), form_(form) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const Choices all = RouterAround::forward(ex, x_TD, balance, keep, saved);
    if (!balance.tokens) return all;
    const TensorView kept_TK = keep.take(all.index_TK.shape, DType::kI32, "router choices within capacity");
    if (balance.tokens.row_N.elements() > 0) limit(ex, kept_TK, all, balance);
    return {kept_TK, all.weight_TK, true};
  }

 private:
  // Every rank of the pool sees the choices of all its tokens, decides alike, and keeps its own.
  void limit(Exec& ex, TensorView kept_TK, const Choices& all, const RouterBalance& balance) const {
    const RoutedTokens& tokens = balance.tokens;
    ScratchScope scope(*ex.scratch);
    const std::int64_t N = tokens.row_N.elements(), K = kept_TK.shape[1], t = kept_TK.shape[0];
    PooledChoices choices;
    choices.index_NK = gather_tokens(ex, *tokens.pool, all.index_TK);
    if (form_.drop == DropBy::kProbability)
      choices.weight_NK = gather_tokens(ex, *tokens.pool, all.weight_TK);
    choices.row_N = tokens.row_N;
    CapacityRule rule;
    rule.pool = form_.pool == CapacityPool::kSequence ? tokens.seq_len : N;
    rule.capacity = expert_capacity(form_.factor, rule.pool * K, form_.experts);
    const TensorView kept_NK = ex.scratch->take({N, K}, DType::kI32, "choices of all ranks within capacity"),
                     lost_GE = ex.scratch->take({N / rule.pool, form_.experts}, DType::kF32, "lost choices");
    ops::limit_choices(ex, kept_NK, lost_GE, choices, rule);
    const std::int64_t first = tokens.pool->rank() * t;
    ops::cast(ex, kept_TK, kept_NK.rows(first, first + t));
    // Counted once: the ranks' sums are added up.
    if (balance.load.lost_1.given() && tokens.pool->rank() == 0)
      ops::sum(ex, balance.load.lost_1, lost_GE.reshape({lost_GE.elements()}));
  }

  CapacityForm form_;
};

}  // namespace

std::unique_ptr<const Router> make_capacity_router(std::unique_ptr<const Router> router,
                                                   const CapacityForm& form) {
  return std::make_unique<CapacityRouter>(std::move(router), form);
}

}  // namespace upmoe

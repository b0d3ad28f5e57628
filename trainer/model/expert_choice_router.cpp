#include "trainer/model/expert_choice_router.h"

#include "configs/expert_use.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {
namespace {

class ExpertChoiceRouter final : public Router {
 public:
  ExpertChoiceRouter(const RouterProduct& product, double choices) : product_(product), choices_(choices) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const std::int64_t T = x_TD.rows(), E = product_.experts();
    saved.x_TD = x_TD;
    saved.probs_TE = keep.take({T, E}, DType::kF32, "router probabilities");
    saved.index_TK = keep.take({T, E}, DType::kI32, "choices of experts");
    saved.lse_T = keep.take({T}, DType::kF32, "router log-sum-exp");
    {
      ScratchScope scope(*ex.scratch);
      const TensorView logits_TE = ex.scratch->take({T, E}, DType::kF32, "router logits"),
                       best_T1 = ex.scratch->take({T, 1}, DType::kI32, "likeliest experts"),
                       weight_T1 = ex.scratch->take({T, 1}, DType::kF32, "their probabilities");
      product_.forward(ex, logits_TE, x_TD);
      ops::route_tokens(ex, saved.probs_TE, best_T1, weight_T1, saved.lse_T, logits_TE, false);
    }
    choose(ex, saved, balance.groups);
    if (balance.load) balance.load.count(ex, routes(saved));
    Choices choices{saved.index_TK, saved.probs_TE, true};
    choices.taken = taken(balance.groups.tokens, T);
    return choices;
  }

  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    ScratchScope scope(*ex.scratch);
    const TensorView dlogits_TE =
        ex.scratch->take(saved.probs_TE.shape, DType::kF32, "router logit gradient");
    ops::route_tokens_backward(ex, dlogits_TE, dweight_TK, balance.terms, routes(saved), false);
    product_.backward(ex, dx_TD, dlogits_TE, saved.x_TD);
  }

 private:
  // A token's weight for an expert stands in that expert's slot.
  static Routes routes(const Saved& s) { return {s.probs_TE, s.index_TK, s.probs_TE, s.lse_T}; }

  GroupCapacity capacity(const TokenGroups& groups) const {
    if (groups.count() == 0) return {};
    return {chosen_of_group(choices_, groups.size, product_.experts()),
            chosen_of_group(choices_, groups.last_size(), product_.experts())};
  }

  // Every tp rank sees the probabilities of all tokens at its positions, decides alike, and keeps its own.
  void choose(Exec& ex, const Saved& saved, const RoutedGroups& groups) const {
    UPMOE_CHECK(groups.tp != nullptr, "experts choose among tokens that nobody grouped");
    ScratchScope scope(*ex.scratch);
    const ConstTensorView probs_NE = gather_tokens(ex, *groups.tp, saved.probs_TE);
    const std::int64_t T = saved.index_TK.rows(), first = groups.tp->rank() * T;
    const bool alone = groups.tp->size() == 1;
    const TensorView index_NE =
        alone ? saved.index_TK
              : ex.scratch->take(probs_NE.shape, DType::kI32, "choices of experts on all tp ranks");
    ops::choose_tokens(ex, index_NE, probs_NE, groups.tokens, capacity(groups.tokens));
    if (!alone) ops::cast(ex, saved.index_TK, index_NE.rows(first, first + T));
  }

  // Of this rank's T tokens, if they get their equal share.
  std::int64_t taken(const TokenGroups& groups, std::int64_t T) const {
    if (groups.count() == 0) return 0;
    const GroupCapacity c = capacity(groups);
    return T * product_.experts() * ((groups.of_position() - 1) * c.full + c.last) / groups.same;
  }

  RouterProduct product_;
  double choices_;
};

}  // namespace

std::unique_ptr<const Router> make_expert_choice_router(const RouterProduct& product, double choices) {
  return std::make_unique<ExpertChoiceRouter>(product, choices);
}

}  // namespace upmoe

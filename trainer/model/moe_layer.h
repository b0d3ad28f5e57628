#pragma once
// Mixture of experts: a router chooses, an exchange brings rows to the ranks that hold their experts and back, the
// experts compute; the shared expert runs while rows are under way. Each rank's t tokens are its own: the exchange
// may span tp ranks.

#include <optional>

#include "trainer/model/dense_ffn.h"
#include "trainer/model/exchange.h"
#include "trainer/model/experts.h"
#include "trainer/model/router.h"

namespace upmoe {

struct MoeLayer {
  std::int64_t num_experts = 0;
  std::unique_ptr<const Router> router;
  std::unique_ptr<const Exchange> exchange;
  Experts experts;  // of this rank
  std::optional<DenseFfn> shared;

  struct Saved {
    Router::Saved router;
    Choices choices;  // the router's
    ExchangePlan plan;
    Experts::Saved experts;
    DenseFfn::Saved shared;
  };

  // y_TD = residual_TD, which may be absent, + what the experts make of x_TD.
  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, ConstTensorView residual_TD,
               const RouterBalance& balance, Arena& keep, Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const RouterBalance& balance,
                const Saved& saved) const;
};

}  // namespace upmoe

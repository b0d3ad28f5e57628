#pragma once
// Routers choose the experts of every token. Each kind is one implementation of this interface.

#include <memory>

#include "trainer/model/balance.h"
#include "trainer/model/choices.h"
#include "trainer/model/layer.h"

namespace upmoe {

class Router {
 public:
  struct Saved {
    ConstTensorView x_TD;
    TensorView probs_TE, index_TK, weight_TK, lse_T;
  };

  virtual ~Router() = default;
  // Counts into balance.load, where there is one.
  virtual Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                          Saved& saved) const = 0;
  // dx_TD += ; from the gradients of the choices' weights and of the balance terms.
  virtual void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                        const Saved& saved) const = 0;
};

// Softmax over all experts, of which the top_k largest are chosen: their probabilities are the weights, divided by
// their sum where `renormalize`. The product is computed in the weight's dtype: beside an fp32 weight, bf16 rows are
// widened for it.
std::unique_ptr<const Router> make_softmax_router(const Param& weight_ED, std::int64_t top_k,
                                                  bool renormalize);

}  // namespace upmoe

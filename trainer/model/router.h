#pragma once
// Routers choose the experts of every token. Each kind is one implementation of this interface, in a file of its own.

#include <memory>

#include "trainer/model/balance.h"
#include "trainer/model/choices.h"
#include "trainer/model/layer.h"

namespace upmoe {

class Router {
 public:
  // Of all kinds; each fills in what its backward reads.
  struct Saved {
    ConstTensorView x_TD;
    TensorView logits_TE, probs_TE, index_TK, weight_TK, lse_T, scale_TE, noisy_TE;
  };

  virtual ~Router() = default;
  // Counts into balance.load, where there is one.
  virtual Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                          Saved& saved) const = 0;
  // dx_TD += ; from the gradients of the choices' weights and of the balance terms.
  virtual void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                        const Saved& saved) const = 0;
};

}  // namespace upmoe

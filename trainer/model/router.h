#pragma once
// Routers choose the experts of every token. Each kind is one implementation of this interface, in a file of its own.

#include <memory>

#include "kernels/ops/routing.h"
#include "trainer/model/balance.h"
#include "trainer/model/choices.h"
#include "trainer/model/layer.h"

namespace upmoe {

// Where the rows of experts are added up, and onto what.
struct RowSums {
  TensorView out;
  SumOnto onto = {};
};

class Router {
 public:
  // Of all kinds; each fills in what its backward reads.
  struct Saved {
    ConstTensorView x_TD;
    TensorView logits_TE, probs_TE, index_TK, weight_TK, lse_T, scale_TE, noisy_TE;
    // Of rows of its own: what experts made of them, and in backward the gradients of the tokens' outputs and of the
    // rows.
    TensorView part_NE, output_MD, drow_MD;
    ConstTensorView dy_TD;
  };

  virtual ~Router() = default;
  // Counts into balance.load, where there is one.
  virtual Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                          Saved& saved) const = 0;
  // dx_TD += ; from the gradients of the choices' weights and of the balance terms.
  virtual void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                        const Saved& saved) const = 0;

  // Of routers whose choices are of rows of their own (Choices::rows_TD), in this order; the others leave all four as
  // they are, and a token's output is what its experts add up to.
  // Where the experts' outputs are added up: rows of `keep`, and the tokens' own sums hold what they begin with.
  virtual RowSums outputs(Exec&, const RowSums& of_tokens, Arena&, Saved&) const { return of_tokens; }
  // y_TD += what the tokens get of the outputs.
  virtual void share_outputs(Exec&, TensorView, const RouterBalance&, const Saved&) const {}
  // In backward, in scratch memory of the caller's scope: the outputs' gradient, and where the experts add up that of
  // the rows. backward() goes on from both.
  virtual ConstTensorView output_gradient(Exec&, ConstTensorView dy_TD, const RouterBalance&, Saved&) const {
    return dy_TD;
  }
  virtual RowSums row_gradient(Exec&, const RowSums& of_tokens, Saved&) const { return of_tokens; }
};

}  // namespace upmoe

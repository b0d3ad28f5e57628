#pragma once
// A dense layer y = x w^T (+ b), and what an adapter beside w adds.

#include <optional>

#include "trainer/model/adapter.h"

namespace upmoe {

struct Linear {
  Param weight_NK;
  std::optional<Param> bias_N = {};
  std::optional<Adapter> adapter = {};

  // Whether backward has a use for x.
  bool wants_input() const { return weight_NK.wants_grad() || (adapter && adapter->wants_grad()); }
  void forward(Exec& ex, TensorView y_TN, ConstTensorView x_TK) const;
  // dx_TK (+)= dy w; weight and bias gradients (+)= .
  void backward(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                ConstTensorView x_TK) const;
  // Its two parts, for who makes the bias's gradient in another pass: both products, and the bias's.
  void backward_products(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                         ConstTensorView x_TK) const;
  void backward_bias(Exec& ex, ConstTensorView dy_TN) const;

 private:
  void backward_adapter(Exec& ex, TensorView dx_TK, ConstTensorView dy_TN, ConstTensorView x_TK) const;
};

}  // namespace upmoe

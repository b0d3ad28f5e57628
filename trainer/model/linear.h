#pragma once
// A dense layer y = x w^T (+ b).

#include <optional>

#include "trainer/model/layer.h"

namespace upmoe {

struct Linear {
  Param weight_NK;
  std::optional<Param> bias_N;

  void forward(Exec& ex, TensorView y_TN, ConstTensorView x_TK) const;
  // dx_TK (+)= dy w; weight and bias gradients (+)= .
  void backward(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                ConstTensorView x_TK) const;
  // Its two parts, for who makes the bias's gradient in another pass: both products, and the bias's.
  void backward_products(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                         ConstTensorView x_TK) const;
  void backward_bias(Exec& ex, ConstTensorView dy_TN) const;
};

}  // namespace upmoe

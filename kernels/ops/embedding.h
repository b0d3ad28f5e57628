#pragma once
// Token embedding. tokens_T: int32.

#include "kernels/core/exec.h"

namespace upmoe::ops {

// x_TD = rows of w_VD. A token outside [0, V) throws Error(kBadInput) that names its position and value.
void embedding_forward(Exec& ex, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD);

// dw_VD += rows of dx_TD; each row of dw has one writer and adds its tokens in token order, summed in fp32.
void embedding_backward(Exec& ex, TensorView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T);

}  // namespace upmoe::ops

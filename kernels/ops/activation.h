#pragma once
// SwiGLU and GeGLU over interleaved gate and up pairs, with an optional weight per row; the scalar sigmoid gate of the
// shared expert. fp32 or bf16 with fp32 arithmetic; row weights and their gradients are fp32.

#include "kernels/core/exec.h"

namespace upmoe::ops {

// h_RF = silu(gate) * up * weight. gate_up_RG holds (gate, up) pairs: G = 2F, gate of neuron f at 2f, up at
// 2f+1. weight_R: fp32; absent: 1.
void swiglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R = {});

// dgate_up_RG from dh_RF; dweight_R (fp32, overwritten) exactly when weight_R is given. dgate_up may alias gate_up.
void swiglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                     ConstTensorView gate_up_RG, ConstTensorView weight_R = {});

// The same with gelu in silu's place, by its tanh form: gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
void geglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R = {});
void geglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                    ConstTensorView gate_up_RG, ConstTensorView weight_R = {});

// gate_T = sigmoid(x_TD w_1D^T), fp32.
void sigmoid_gate_forward(Exec& ex, TensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D);

// dx_TD += , dw_1D (+)= , from dgate_T (fp32), the gradient of the sigmoid's value. dx_TD may be absent: who adds rows
// to it anyway adds the gate's share in the same pass (SumOnto of routing.h).
void sigmoid_gate_backward(Exec& ex, TensorView dx_TD, GradientView dw_1D, ConstTensorView dgate_T,
                           ConstTensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D);

}  // namespace upmoe::ops

#include "kernels/ops/activation.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

// h (or dh) is [R, F], gate_up (or its gradient) [R, 2F] of the same dtype; the weight, if any, fp32 [R].
void check_gated(const Exec& ex, const ConstTensorView& h_RF, const ConstTensorView& gate_up_RG,
                 const ConstTensorView& weight_R,
                 std::source_location where = std::source_location::current()) {
  check_float(h_RF, "h_RF", where);
  if (h_RF.shape.rank != 2) fail_check("h is [R, F]", where, "h_RF is " + h_RF.shape.str());
  check_tensor(ex, h_RF, h_RF.shape, h_RF.dtype, "h_RF", where);
  check_tensor(ex, gate_up_RG, {h_RF.shape[0], 2 * h_RF.shape[1]}, h_RF.dtype, "gate_up_RG", where);
  if (weight_R.given()) check_tensor(ex, weight_R, {h_RF.shape[0]}, DType::kF32, "weight_R", where);
}

void check_gated_backward(const Exec& ex, const TensorView& dgate_up_RG, const TensorView& dweight_R,
                          const ConstTensorView& dh_RF, const ConstTensorView& gate_up_RG,
                          const ConstTensorView& weight_R,
                          std::source_location where = std::source_location::current()) {
  check_gated(ex, dh_RF, gate_up_RG, weight_R, where);
  check_tensor(ex, dgate_up_RG, gate_up_RG.shape, gate_up_RG.dtype, "dgate_up_RG", where);
  if (weight_R.given() != dweight_R.given())
    fail_check("weight_R and dweight_R come together", where, "one is missing");
  if (dweight_R.given()) check_tensor(ex, dweight_R, weight_R.shape, DType::kF32, "dweight_R", where);
}

double bytes_if_given(const ConstTensorView& t) {
  return t.given() ? bytes_of(t) : 0.0;
}

// `flops` of each element of h.
void book_forward(const Exec& ex, const char* op, double flops, const ConstTensorView& h_RF,
                  const ConstTensorView& gate_up_RG, const ConstTensorView& weight_R) {
  ex.book(op, flops * static_cast<double>(h_RF.elements()), bytes_of(gate_up_RG) + bytes_if_given(weight_R),
          bytes_of(h_RF));
}
void book_backward(const Exec& ex, const char* op, double flops, const ConstTensorView& dh_RF,
                   const ConstTensorView& gate_up_RG, const ConstTensorView& weight_R) {
  ex.book(op, flops * static_cast<double>(dh_RF.elements()),
          bytes_of(dh_RF) + bytes_of(gate_up_RG) + bytes_if_given(weight_R),
          bytes_of(gate_up_RG) + bytes_if_given(weight_R));
}

void check_gate(const Exec& ex, const ConstTensorView& gate_T, const ConstTensorView& x_TD,
                const ConstTensorView& w_1D, std::source_location where = std::source_location::current()) {
  check_float(x_TD, "x_TD", where);
  if (x_TD.shape.rank != 2) fail_check("x is [T, D]", where, "x_TD is " + x_TD.shape.str());
  check_tensor(ex, x_TD, x_TD.shape, x_TD.dtype, "x_TD", where);
  check_tensor(ex, w_1D, {1, x_TD.shape[1]}, x_TD.dtype, "w_1D", where);
  check_tensor(ex, gate_T, {x_TD.shape[0]}, DType::kF32, "gate_T", where);
}

}  // namespace

void swiglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  check_gated(ex, h_RF, gate_up_RG, weight_R);
  book_forward(ex, "swiglu_forward", 6.0, h_RF, gate_up_RG, weight_R);
  dispatch(ex, &Backend::swiglu_forward, h_RF, gate_up_RG, weight_R);
}

void swiglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                     ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  check_gated_backward(ex, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
  book_backward(ex, "swiglu_backward", 15.0, dh_RF, gate_up_RG, weight_R);
  dispatch(ex, &Backend::swiglu_backward, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

// Beside swiglu: the cubic polynomial of the gate, and its derivative.
void geglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  check_gated(ex, h_RF, gate_up_RG, weight_R);
  book_forward(ex, "geglu_forward", 10.0, h_RF, gate_up_RG, weight_R);
  dispatch(ex, &Backend::geglu_forward, h_RF, gate_up_RG, weight_R);
}

void geglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                    ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  check_gated_backward(ex, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
  book_backward(ex, "geglu_backward", 22.0, dh_RF, gate_up_RG, weight_R);
  dispatch(ex, &Backend::geglu_backward, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

void sigmoid_gate_forward(Exec& ex, TensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  check_gate(ex, gate_T, x_TD, w_1D);
  ex.book("sigmoid_gate_forward", 2.0 * static_cast<double>(x_TD.elements()), bytes_of(x_TD) + bytes_of(w_1D),
          bytes_of(gate_T), Work::kRowSums);
  dispatch(ex, &Backend::sigmoid_gate_forward, gate_T, x_TD, w_1D);
}

void sigmoid_gate_backward(Exec& ex, TensorView dx_TD, GradientView dw_1D, ConstTensorView dgate_T,
                           ConstTensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  check_scratch(ex);
  check_gate(ex, gate_T, x_TD, w_1D);
  check_tensor(ex, dgate_T, gate_T.shape, DType::kF32, "dgate_T");
  const bool with_dx = dx_TD.given();
  if (with_dx) {
    check_float_or(dx_TD, x_TD.dtype, "dx_TD");
    check_tensor(ex, dx_TD, x_TD.shape, dx_TD.dtype, "dx_TD");
  }
  check_float_or(dw_1D, x_TD.dtype, "dw_1D");
  check_tensor(ex, dw_1D, w_1D.shape, dw_1D.dtype, "dw_1D");
  const double dx_bytes = with_dx ? bytes_of(dx_TD) : 0.0, w_bytes = with_dx ? bytes_of(w_1D) : 0.0;
  ex.book("sigmoid_gate_backward", (with_dx ? 4.0 : 2.0) * static_cast<double>(x_TD.elements()),
          bytes_of(x_TD) + w_bytes + 2 * bytes_of(gate_T) + dx_bytes + bytes_if_added(dw_1D),
          dx_bytes + bytes_of(dw_1D), Work::kRowSums);
  dispatch(ex, &Backend::sigmoid_gate_backward, dx_TD, dw_1D, dgate_T, gate_T, x_TD, w_1D);
}

}  // namespace upmoe::ops

#include "kernels/ops/adamw.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

void adamw(Exec& ex, TensorView weight, TensorView master, TensorView m, TensorView v, ConstTensorView grad,
           const AdamWStep& step) {
  UPMOE_CHECK(grad.shape.rank == 1, "grad is {}, expected a flat tensor", grad.shape.str());
  UPMOE_CHECK(step.step >= 1, "steps count from 1, found {}", step.step);
  check_float(grad, "grad");
  check_float(weight, "weight");
  check_tensor(ex, grad, grad.shape, grad.dtype, "grad");
  check_tensor(ex, weight, grad.shape, weight.dtype, "weight");
  check_tensor(ex, master, grad.shape, DType::kF32, "master");
  check_tensor(ex, m, grad.shape, DType::kF32, "m");
  check_tensor(ex, v, grad.shape, DType::kF32, "v");
  UPMOE_CHECK(weight.data == nullptr || weight.data != master.data || weight.dtype == DType::kF32,
              "only an fp32 weight may be the master itself");
  const bool separate = weight.data != master.data || weight.dtype != master.dtype;
  const double state_bytes = bytes_of(master) + bytes_of(m) + bytes_of(v);
  ex.book("adamw", 14.0 * static_cast<double>(grad.elements()), state_bytes + bytes_of(grad),
          state_bytes + (separate ? bytes_of(weight) : 0.0));
  dispatch(ex, &Backend::adamw, weight, master, m, v, grad, step);
}

}  // namespace upmoe::ops

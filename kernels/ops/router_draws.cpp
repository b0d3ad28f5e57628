#include "kernels/ops/router_draws.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

void draw_second(Exec& ex, TensorView kept_T2, ConstTensorView index_T2, ConstTensorView weight_T2,
                 const TokenDraws& draws) {
  UPMOE_CHECK(index_T2.shape.rank == 2 && index_T2.shape[1] == 2, "index_T2 {}", index_T2.shape.str());
  check_tensor(ex, index_T2, index_T2.shape, DType::kI32, "index_T2");
  check_tensor(ex, kept_T2, index_T2.shape, DType::kI32, "kept_T2");
  check_tensor(ex, weight_T2, index_T2.shape, DType::kF32, "weight_T2");
  check_tensor(ex, draws.place_T, {index_T2.shape[0]}, DType::kI32, "place_T");
  ex.book("draw_second", 0, bytes_of(index_T2) + bytes_of(weight_T2) + bytes_of(draws.place_T),
          bytes_of(kept_T2));
  dispatch(ex, &Backend::draw_second, kept_T2, index_T2, weight_T2, draws);
}

void jitter(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenDraws& draws, float amount,
            Accumulate mode) {
  UPMOE_CHECK(x_TD.shape.rank == 2, "x_TD {}", x_TD.shape.str());
  UPMOE_CHECK(amount >= 0 && amount < 1, "a factor between {} and {}", 1 - amount, 1 + amount);
  check_float(x_TD, "x_TD");
  check_tensor(ex, x_TD, x_TD.shape, x_TD.dtype, "x_TD");
  check_tensor(ex, y_TD, x_TD.shape, x_TD.dtype, "y_TD");
  check_tensor(ex, draws.place_T, {x_TD.shape[0]}, DType::kI32, "place_T");
  ex.book("jitter", static_cast<double>(x_TD.elements()),
          bytes_of(x_TD) + bytes_of(draws.place_T) + (mode == Accumulate::kAdd ? bytes_of(y_TD) : 0.0),
          bytes_of(y_TD));
  dispatch(ex, &Backend::jitter, y_TD, x_TD, draws, amount, mode);
}

}  // namespace upmoe::ops

#include "kernels/ops/embedding.h"

#include <limits>

#include "kernels/ops/backend.h"
#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_embedding(const Exec& ex, const ConstTensorView& x_TD, const ConstTensorView& tokens_T,
                     const ConstTensorView& w_VD,
                     std::source_location where = std::source_location::current()) {
  if (w_VD.shape.rank != 2 || tokens_T.shape.rank != 1 ||
      w_VD.shape[0] > std::numeric_limits<std::int32_t>::max())
    fail_check("w is [V, D], tokens are [T]", where,
               fmt::format("{} and {}", w_VD.shape.str(), tokens_T.shape.str()));
  check_tensor(ex, tokens_T, tokens_T.shape, DType::kI32, "tokens_T", where);
  check_tensor(ex, w_VD, w_VD.shape, w_VD.dtype, "w_VD", where);
  check_tensor(ex, x_TD, {tokens_T.shape[0], w_VD.shape[1]}, x_TD.dtype, "x_TD", where);
}

}  // namespace

void embedding_forward(Exec& ex, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD) {
  check_float(w_VD, "w_VD");
  UPMOE_CHECK(x_TD.dtype == w_VD.dtype, "x_TD is {}, w_VD {}", name_of(x_TD.dtype), name_of(w_VD.dtype));
  check_embedding(ex, x_TD, tokens_T, w_VD);
  ex.book("embedding_forward", 0, bytes_of(x_TD) + bytes_of(tokens_T), bytes_of(x_TD));
  dispatch(ex, cpu::embedding_forward, cuda::embedding_forward, x_TD, tokens_T, w_VD);
}

void embedding_backward(Exec& ex, TensorView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T) {
  check_scratch(ex);
  check_float(dx_TD, "dx_TD");
  check_float_or(dw_VD, dx_TD.dtype, "dw_VD");
  check_embedding(ex, dx_TD, tokens_T, dw_VD);
  // Each token's row of dw is read and written, at most: repeated tokens share theirs.
  const double rows = static_cast<double>(dx_TD.elements()) * static_cast<double>(size_of(dw_VD.dtype));
  ex.book("embedding_backward", static_cast<double>(dx_TD.elements()),
          bytes_of(dx_TD) + bytes_of(tokens_T) + rows, rows);
  dispatch(ex, cpu::embedding_backward, cuda::embedding_backward, dw_VD, dx_TD, tokens_T);
}

}  // namespace upmoe::ops

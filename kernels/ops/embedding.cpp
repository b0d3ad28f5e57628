#include "kernels/ops/embedding.h"

#include <limits>

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_embedding(const Exec& ex, const ConstTensorView& x_TD, const ConstTensorView& tokens_T,
                     const ConstTensorView& w_VD, const VocabShard& shard,
                     std::source_location where = std::source_location::current()) {
  if (w_VD.shape.rank != 2 || tokens_T.shape.rank != 1 ||
      shard.total > std::numeric_limits<std::int32_t>::max())
    fail_check("w is [V, D], tokens are [T]", where,
               fmt::format("{} and {}", w_VD.shape.str(), tokens_T.shape.str()));
  if (shard.begin < 0 || shard.begin > shard.total - w_VD.shape[0])
    fail_check("the shard lies in the vocabulary", where,
               fmt::format("{} rows from {} of {}", w_VD.shape[0], shard.begin, shard.total));
  check_tensor(ex, tokens_T, tokens_T.shape, DType::kI32, "tokens_T", where);
  check_tensor(ex, w_VD, w_VD.shape, w_VD.dtype, "w_VD", where);
  check_tensor(ex, x_TD, {tokens_T.shape[0], w_VD.shape[1]}, x_TD.dtype, "x_TD", where);
}

}  // namespace

void embedding_forward(Exec& ex, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD,
                       VocabShard shard) {
  if (shard.total == 0) shard = {0, w_VD.shape[0]};
  check_float(w_VD, "w_VD");
  UPMOE_CHECK(x_TD.dtype == w_VD.dtype, "x_TD is {}, w_VD {}", name_of(x_TD.dtype), name_of(w_VD.dtype));
  check_embedding(ex, x_TD, tokens_T, w_VD, shard);
  ex.book("embedding_forward", 0, bytes_of(x_TD) + bytes_of(tokens_T), bytes_of(x_TD));
  dispatch(ex, &Backend::embedding_forward, x_TD, tokens_T, w_VD, shard);
}

void embedding_backward(Exec& ex, GradientView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T,
                        VocabShard shard) {
  if (shard.total == 0) shard = {0, dw_VD.shape[0]};
  check_scratch(ex);
  check_float(dx_TD, "dx_TD");
  check_float_or(dw_VD, dx_TD.dtype, "dw_VD");
  check_embedding(ex, dx_TD, tokens_T, dw_VD, shard);
  // Each token's row of dw is read and written, at most: repeated tokens share theirs. Overwritten, all rows
  // are zeros first.
  const double rows = static_cast<double>(dx_TD.elements()) * static_cast<double>(size_of(dw_VD.dtype));
  ex.book("embedding_backward", static_cast<double>(dx_TD.elements()),
          bytes_of(dx_TD) + bytes_of(tokens_T) + rows, rows + (dw_VD.adds() ? 0.0 : bytes_of(dw_VD)));
  dispatch(ex, &Backend::embedding_backward, dw_VD, dx_TD, tokens_T, shard);
}

}  // namespace upmoe::ops

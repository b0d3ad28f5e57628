#include "kernels/ops/capacity.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

void limit_choices(Exec& ex, TensorView kept_NK, TensorView lost_GE, const PooledChoices& choices,
                   const CapacityRule& rule) {
  const auto& [index_NK, weight_NK, row_N] = choices;
  UPMOE_CHECK(index_NK.shape.rank == 2 && lost_GE.shape.rank == 2, "index_NK {}, lost_GE {}",
              index_NK.shape.str(), lost_GE.shape.str());
  const std::int64_t N = index_NK.shape[0];
  UPMOE_CHECK(rule.pool >= 1 && N % rule.pool == 0 && rule.capacity >= 1,
              "{} tokens in pools of {}, of which an expert takes {}", N, rule.pool, rule.capacity);
  check_tensor(ex, index_NK, index_NK.shape, DType::kI32, "index_NK");
  check_tensor(ex, kept_NK, index_NK.shape, DType::kI32, "kept_NK");
  check_tensor(ex, row_N, {N}, DType::kI32, "row_N");
  check_tensor(ex, lost_GE, {N / rule.pool, lost_GE.shape[1]}, DType::kF32, "lost_GE");
  if (weight_NK.given()) check_tensor(ex, weight_NK, index_NK.shape, DType::kF32, "weight_NK");
  ex.book("limit_choices", 0,
          bytes_of(index_NK) + bytes_of(row_N) + (weight_NK.given() ? bytes_of(weight_NK) : 0.0),
          bytes_of(kept_NK) + bytes_of(lost_GE));
  dispatch(ex, &Backend::limit_choices, kept_NK, lost_GE, choices, rule);
}

}  // namespace upmoe::ops

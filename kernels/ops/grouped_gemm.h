#pragma once
// One product per local expert over that expert's rows: rows [offsets[i], offsets[i+1]) of the R rows belong
// to expert i. `expert_offsets` is on the host and has e+1 entries; experts may have no rows. Inputs fp32 or
// bf16 (all the same), sums in fp32. Bitwise repeatable for any number of threads.

#include <span>

#include "kernels/core/exec.h"

namespace upmoe::ops {

// y_RN = x_RK w_i^T with w_i = w_eNK[i], a Linear weight [N, K].
void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          std::span<const std::int64_t> expert_offsets);

// dx_RK = dy_RN w_i.
void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        std::span<const std::int64_t> expert_offsets);

// dw_i (+)= dy_i^T x_i; an expert without rows gets zeros (kOverwrite) or is left alone (kAdd).
void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        std::span<const std::int64_t> expert_offsets, Accumulate mode);

}  // namespace upmoe::ops

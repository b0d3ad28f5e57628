#pragma once
// One product per local expert over that expert's rows. Inputs fp32 or bf16 (all the same), sums in fp32. Bitwise
// repeatable for any number of threads.
//
// A kernel that takes one product at a time needs the rows' copy on the host. Where there is none it is fetched: the
// host waits for the stream, once in a call.

#include "kernels/ops/expert_rows.h"

namespace upmoe::ops {

// y_RN = x_RK w_i^T with w_i = w_eNK[i], a Linear weight [N, K].
void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          const ExpertRows& rows);

// dx_RK = dy_RN w_i.
void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        const ExpertRows& rows);

// dw_i (+)= dy_i^T x_i; an expert without rows gets zeros (kOverwrite) or is left alone (kAdd).
void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        const ExpertRows& rows, Accumulate mode);

}  // namespace upmoe::ops

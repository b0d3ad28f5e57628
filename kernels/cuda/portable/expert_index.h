#pragma once
// What a kernel for all experts at once needs to know of their rows.

#include "kernels/core/exec.h"

namespace upmoe::cuda {

// token_R[i] = index_R[i] / divisor, or i without an index; int32.
void row_tokens(const Exec& ex, const TensorView& token_R, const ConstTensorView& index_R,
                std::int64_t divisor);

// The experts by falling number of rows, the first one first among equals; int32. At most 1,024 experts.
void rank_experts(const Exec& ex, const TensorView& ranking_e, const ConstTensorView& offset_e1);

// sum_R[i] = the sum of row i of parts_RP, in order; fp32.
void sum_parts(const Exec& ex, const TensorView& sum_R, const ConstTensorView& parts_RP);

}  // namespace upmoe::cuda

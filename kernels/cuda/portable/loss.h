#pragma once
// Cross-entropy by a kernel that every GPU runs: one block for each row, which it reads once for the loss and, where a
// gradient is asked for, again. Contracts stand in kernels/ops/loss.h.

#include "kernels/ops/loss.h"

namespace upmoe::cuda::portable {

void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C);

// Reports targets outside [-1, vocab), which a kernel that cannot do so by itself takes as ignored.
void check_targets(Exec& ex, ConstTensorView targets_C, std::int64_t vocab);

}  // namespace upmoe::cuda::portable

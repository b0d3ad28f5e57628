#pragma once
// Softmax cross-entropy over one chunk of rows, so that the logits of a whole batch never exist.

#include "kernels/core/exec.h"

namespace upmoe::ops {

// loss_C[c] = logsumexp(logits) - logits[target], fp32; 0 where target is -1 (ignored). logits_CV: fp32.
// dlogits_CV, if given (fp32 or bf16; an fp32 one may alias logits_CV): scale * (softmax - onehot), 0 where
// ignored. targets_C: int32; one outside [-1, V) throws Error(kBadInput).
void cross_entropy(Exec& ex, TensorView loss_C, const TensorView* dlogits_CV, ConstTensorView logits_CV,
                   ConstTensorView targets_C, float scale);

}  // namespace upmoe::ops

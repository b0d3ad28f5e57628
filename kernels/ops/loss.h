#pragma once
// Softmax cross-entropy over one chunk of rows, so that the logits of a whole batch never exist.

#include "kernels/core/exec.h"
#include "kernels/ops/vocab_shard.h"

namespace upmoe {
// Of each token: its loss (fp32), and scale times the gradient of its logits where that is asked for (fp32 or bf16).
struct TokenLosses {
  TensorView loss_C, dlogits_CV;
  float scale = 1;
};
}  // namespace upmoe

namespace upmoe::ops {

// loss_C[c] = logsumexp(logits) - logits[target], fp32; 0 where target is -1 (ignored). logits_CV: fp32.
// dlogits_CV, if given (an fp32 one may alias logits_CV): scale * (softmax - onehot), 0 where ignored. targets_C:
// int32; one outside [-1, V) throws Error(kBadInput).
void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C);

// The same with the vocabulary divided between P ranks, whose logits_CV hold the tokens of their `shard`.
// Each rank first takes what the others must know: stats_C3 (fp64), per row the largest logit, the sum of
// exp(logit - largest), and the target's logit (0 where another shard holds it). The ranks' stats, gathered
// to stats_PC3 in the order of the shards, then give every rank the whole loss and its part of the gradient.
void cross_entropy_stats(Exec& ex, TensorView stats_C3, ConstTensorView logits_CV, ConstTensorView targets_C,
                         VocabShard shard);
void cross_entropy_sharded(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                           ConstTensorView targets_C, ConstTensorView stats_PC3, VocabShard shard);

}  // namespace upmoe::ops

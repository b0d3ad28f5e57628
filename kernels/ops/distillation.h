#pragma once
// What a student learns from a teacher's logits beside its targets, over one chunk of rows. With logits z of the
// student and t of the teacher, temperature tau and weight w, a token's loss and its gradient are
//
//   L     = (1 - w) CE(softmax(z), target) + w tau^2 KL(q || p),    q = softmax(t / tau), p = softmax(z / tau)
//   dL/dz = (1 - w) (softmax(z) - [the target]) + w tau (p - q)
//
// KL(q || p) = sum_v q_v (log q_v - log p_v): the soft cross entropy of Hinton, Vinyals and Dean (arXiv 1503.02531,
// section 2) less the entropy of q, which no student changes. A gradient of it goes with 1 / tau^2; so tau^2, as they
// say, keeps the two terms' shares whatever the temperature is.

#include "kernels/core/exec.h"
#include "kernels/ops/vocab_shard.h"

namespace upmoe {

struct Distillation {
  double weight = 0.5;     // of the divergence; the cross entropy has the rest
  double temperature = 1;  // of both softmaxes, above 0
};

// fp32 logits of the tokens of `shard`, whose total is the whole vocabulary; what is not finite makes losses that are
// not. targets_C: int32, of the whole vocabulary, -1: ignored.
struct DistilledRows {
  ConstTensorView logits_CV, teacher_CV, targets_C;
  VocabShard shard;
};

// Of each token: its cross entropy and tau^2 KL (fp32), and scale times the gradient of L where that is asked for
// (fp32, which may be the memory of logits_CV, or bf16).
struct DistilledLosses {
  TensorView loss_C, divergence_C, dlogits_CV;
  float scale = 1;
};

// What the ranks that share a vocabulary must know of each other's part of a row, in fp64: [0] the student's largest
// logit m, [1] the sum of exp(z - m), [2] the target's logit (0 where another shard holds it), [3] the sum of
// exp((z - m) / tau), [4] the teacher's largest logit n, [5] the sum of exp((t - n) / tau), [6] the sum of
// exp((t - n) / tau) ((t - n) - (z - m)) / tau.
inline constexpr std::int64_t kDistillationStats = 7;

}  // namespace upmoe

namespace upmoe::ops {

// stats_C7 (fp64) of this rank's shard; a target outside [-1, the vocabulary) throws Error(kBadInput).
void distillation_stats(Exec& ex, TensorView stats_C7, const DistilledRows& rows, double temperature);

// From the stats of all P shards in their order, stats_PC7, every rank's whole losses, the same bits on each, and its
// part of the gradient. Ignored rows: 0. Where the teacher's logits are the student's, KL is 0 to the bit and its part
// of the gradient 0 but for the rounding of p.
void distillation_losses(Exec& ex, const DistilledLosses& out, const DistilledRows& rows,
                         ConstTensorView stats_PC7, const Distillation& rule);

}  // namespace upmoe::ops

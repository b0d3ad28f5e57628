#pragma once
// Output projection and cross-entropy in chunks of rows: logits exist for one chunk at a time, and their
// gradient is spent in the same pass. Under tp each rank has its share of the vocabulary and all tokens.

#include <functional>

#include "kernels/ops/distillation.h"
#include "kernels/ops/loss.h"
#include "parallel/communicator.h"
#include "trainer/model/layer.h"

namespace upmoe {

struct LmHead;

// What a model learns from its teacher (kernels/ops/distillation.h): the teacher's head, which has the same share of
// the same vocabulary, and what it reads, of the same tokens. Without a head: no teacher.
struct SoftTargets {
  const LmHead* head = nullptr;
  ConstTensorView x_tD = {};
  Distillation rule = {};
  explicit operator bool() const { return head != nullptr; }
};

struct Targets {
  ConstTensorView token_T;  // int32, -1: none
  SoftTargets soft = {};
};

// fp64, on the device: of cross entropies and, with a teacher, of divergences.
struct LossSums {
  TensorView loss_1, divergence_1 = {};
};

struct LmHead {
  Param weight_VD;  // this rank's rows
  VocabShard shard;
  Communicator* tp = nullptr;

  // Called with the fp32 logits of rows [begin, begin + logits.rows()): this rank's share of the vocabulary.
  using Sink = std::function<void(std::int64_t begin, ConstTensorView logits_CV)>;

  // Adds what the T tokens' losses add up to to `sums` of tp rank 0. With dx_tD, which may be absent: scale times the
  // gradient of that sum, with a teacher of the weighted one, overwrites it and is added to the weight's gradient.
  void forward(Exec& ex, const LossSums& sums, ConstTensorView x_tD, const Targets& targets, TensorView dx_tD,
               float scale, const Sink& sink = {}) const;
  // fp32 logits of the whole vocabulary on every rank, [N, V], in memory of `keep`: of the tokens pick_N (int32) of all
  // T; without a shape, of all of them. Collective over tp.
  TensorView logits(Exec& ex, ConstTensorView x_tD, ConstTensorView pick_N, Arena& keep) const;

 private:
  void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                     ConstTensorView targets_C) const;
  // Of rows of the teacher's as well, x_CD of what its head reads.
  void distil(Exec& ex, const DistilledLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C,
              const SoftTargets& soft, ConstTensorView x_CD) const;
};

}  // namespace upmoe

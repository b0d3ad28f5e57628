#pragma once
// Output projection and cross-entropy in chunks of rows: logits exist for one chunk at a time, and their
// gradient is spent in the same pass. Under tp each rank has its share of the vocabulary and all tokens.

#include <functional>

#include "kernels/ops/loss.h"
#include "parallel/communicator.h"
#include "trainer/model/layer.h"

namespace upmoe {

struct LmHead {
  Param weight_VD;  // this rank's rows
  VocabShard shard;
  Communicator* tp = nullptr;

  // Called with the fp32 logits of rows [begin, begin + logits.rows()): this rank's share of the vocabulary.
  using Sink = std::function<void(std::int64_t begin, ConstTensorView logits_CV)>;

  // Adds the sum of the T tokens' cross-entropies to loss_1 (fp64) of tp rank 0. With dx_tD, which
  // may be absent: scale times the gradient of that sum overwrites it and is added to the weight's gradient.
  void forward(Exec& ex, TensorView loss_1, ConstTensorView x_tD, ConstTensorView targets_T, TensorView dx_tD,
               float scale, const Sink& sink = {}) const;
  // fp32 logits of the whole vocabulary on every rank, [N, V], in memory of `keep`: of the tokens pick_N (int32) of all
  // T. Collective over tp.
  TensorView logits(Exec& ex, ConstTensorView x_tD, ConstTensorView pick_N, Arena& keep) const;

 private:
  void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                     ConstTensorView targets_C) const;
};

}  // namespace upmoe

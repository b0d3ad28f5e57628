#pragma once
// The model: embedding, blocks, final norm, head and loss.

#include <functional>
#include <vector>

#include "parallel/mesh.h"
#include "trainer/model/block.h"
#include "trainer/model/lm_head.h"
#include "trainer/model/param_store.h"

namespace upmoe {

struct MicroBatch {  // T tokens, a multiple of seq_len; T = 0 is a rank without work that still
  ConstTensorView tokens_T, targets_T;  // takes part in the exchange of expert rows
  TokenPlaces places;
};

struct Transformer {
  Param embed_VD;
  std::vector<Block> blocks;
  RmsNorm final_norm;
  LmHead head;
  DType dtype = DType::kF32;  // of activations

  struct Saved {
    std::vector<Block::Saved> blocks;
    ConstTensorView tokens_T;
    RmsNorm::Saved final_norm;
    TensorView dnormed_TD;  // gradient of the final norm's output, made together with the loss
    BalanceTerms balance;
  };

  // Sum of the tokens' cross-entropies. The gradient is that of loss_scale * sum + the balance terms; it is
  // complete after backward. Memory of `saved` comes from `keep`.
  double forward(Exec& ex, const MicroBatch& batch, double loss_scale, const BalanceConfig& balance,
                 Arena& keep, Saved& saved) const;
  // layer_done(i): the gradients of block i are final for this micro-batch; called last to first, then with
  // -1 for embedding, final norm and head.
  void backward(Exec& ex, Arena& keep, Saved& saved, const std::function<void(int)>& layer_done) const;
  // Sum of the cross-entropies without gradients; keeps nothing. `sink` sees the logits, chunk by chunk.
  double evaluate(Exec& ex, const MicroBatch& batch, Arena& keep, const LmHead::Sink& sink = {}) const;
};

Transformer make_transformer(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                             Recompute recompute);

}  // namespace upmoe

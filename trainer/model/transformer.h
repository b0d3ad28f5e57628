#pragma once
// The model, or one chunk of it where a pipeline cuts it: a run of blocks, with the embedding before the
// first block and final norm, head and loss after the last one.

#include <functional>
#include <optional>
#include <vector>

#include "kernels/ops/vocab_shard.h"
#include "parallel/mesh.h"
#include "trainer/model/block.h"
#include "trainer/model/key_cache.h"
#include "trainer/model/lm_head.h"
#include "trainer/model/param_store.h"

namespace upmoe {

struct MicroBatch {  // T tokens, a multiple of seq_len; T = 0 is a rank without work that still
  ConstTensorView tokens_T, targets_T;  // takes part in the exchange of expert rows
  TokenPlaces places;
  // Which of the micro-batch's sequences a token is of; given where routers count by sequence.
  ConstTensorView sequence_T = {};
  std::int64_t sequences = 0;
  bool weights = false, chances = false;  // whether routers sum them, for kImportance and kLoad
  RoutedTokens routed = {};  // given where routers ask for it; the model says on which layers and ranks
  TokenGroups groups = {};   // likewise, in evaluation too: of the tokens of this rank's tp group
  SoftTargets soft = {};     // in training beside a teacher; of the last chunk
};

struct Embedding {
  Param weight_VD;  // this rank's rows
  VocabShard shard;
  float scale = 1;  // of the rows that a token gets; a head that is the same matrix knows nothing of it
};

struct OutputHead {
  Norm norm;
  LmHead head;
};

struct Transformer {
  std::optional<Embedding> embedding;  // of the first chunk
  std::vector<Block> blocks;
  std::optional<OutputHead> output;  // of the last chunk
  std::int64_t hidden_size = 0;
  int first_block = 0;  // number of blocks[0] in the whole model
  // Backward ends with this one of the blocks: those before it and the embedding are frozen. Of the first chunk alone;
  // in the others there may be something below.
  std::size_t first_trained = 0;
  Communicator* tp = nullptr;
  Communicator* pool = nullptr;  // the ranks that share a micro-batch's tokens: cp x tp
  DType dtype = DType::kF32;     // of activations

  struct Saved {
    std::vector<Block::Saved> blocks;
    // Of this chunk's mixtures, over all tokens of the micro-batch, and what lies in their rows.
    TensorView loads_ML;
    LoadRow row;
    ConstTensorView tokens_T;
    std::int64_t tokens = 0;    // T, over all ranks that share the micro-batch
    ConstTensorView output_tD;  // of the last block
    Norm::Saved final_norm;
    TensorView dnormed_tD;  // gradient of the final norm's output, made together with the loss
    // fp64: sum of the tokens' cross-entropies and, with a teacher, of divergences; of tp rank 0 of the last chunk.
    TensorView loss_1, divergence_1;
  };

  // input_tD: the previous chunk's output, kept by the caller until backward; not looked at by the first
  // chunk. Memory of `saved` comes from `keep`. before_block(i), i counted in the whole model: block i is
  // about to run; -1: the embedding or the head.
  void forward(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, double loss_scale, Arena& keep,
               Saved& saved, const std::function<void(int)>& before_block = {}) const;
  // Between forward and backward: gradients of the balance terms, from the loads of all chunks' `mixtures`, of which
  // pool_2E is the pool. Where values_V is given, z and the terms' values are added to it.
  struct Loads {
    ConstTensorView pool_2E;
    std::int64_t mixtures = 0;
    TensorView values_V = {};
  };
  void set_balance(Exec& ex, const BalanceConfig& config, const Loads& all, Arena& keep, Saved& saved) const;
  // g_tD: the gradient of the output in (written here by the last chunk), that of the input out. The loss is
  // loss_scale * sum + the balance terms. block_done(i), i counted in the whole model: the gradients of block
  // i are final for this micro-batch; called last to first.
  void backward(Exec& ex, TensorView g_tD, Arena& keep, Saved& saved,
                const std::function<void(int)>& block_done) const;
  // see(i, choices), i counted in the whole model: what the router of block i, a mixture, chose for this rank's tokens,
  // on this rank's device and there until `see` returns. Of models without recomputation.
  using SeeRouting = std::function<void(int block, const Choices& choices)>;
  // Forward without gradients: the output, in memory of `keep`, or the sum of the cross-entropies (last
  // chunk; tp rank 0). `sink` sees this rank's logits, chunk by chunk.
  struct Evaluated {
    ConstTensorView output_tD;
    double loss = 0;
  };
  Evaluated evaluate(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, Arena& keep,
                     const LmHead::Sink& sink = {}, const SeeRouting& routing = {}) const;

  // Of a whole model, forward alone: what the head reads, of this rank's tokens; all that `keep` has of it then.
  ConstTensorView head_input(Exec& ex, const MicroBatch& batch, Arena& keep) const;

  // Of a whole model: the same over tokens whose rows go on from step to step; fp32 logits of the tokens pick_N of all
  // T, over the whole vocabulary and on every rank of tp, in memory of `keep`. N may be 0. Where tp divides N, and N is
  // less than T, the last block makes the output of these alone.
  struct Continuation {
    const KeyCaches& caches;
    CachedTokens tokens;
    bool begins = false;     // as in CachedPlaces
    ConstTensorView pick_N;  // int32
  };
  TensorView logits(Exec& ex, const MicroBatch& batch, const Continuation& rows, Arena& keep) const;
  std::vector<AttentionShape> attention_of_blocks() const;  // of this rank's heads

  // Forward through this chunk's blocks alone: see(i, x_TD), i counted in the whole model, with what the FFN or the
  // mixture of block i reads, which is there until `see` returns.
  using SeeInputs = std::function<void(int block, ConstTensorView x_TD)>;
  void ffn_inputs(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, Arena& keep,
                  const SeeInputs& see) const;

  std::int64_t own_tokens(const MicroBatch& batch) const { return batch.tokens_T.rows() / tp->size(); }  // t

 private:
  bool shares_norms() const { return !blocks.empty() && blocks.front().shares_norms(); }
  void embed(Exec& ex, TensorView x_tD, const MicroBatch& batch) const;
  bool picks_fewer(const Continuation& rows) const;
  // Two buffers of the stream that take turns; the other one is free.
  struct Turns {
    TensorView x_tD, y_tD;
    ConstTensorView output_tD;
  };
  struct Sees {  // of each block, where given
    SeeInputs inputs = {};
    SeeRouting routing = {};
    void operator()(int number, const Block::Saved& saved) const;
  };
  // The embedding, where it is this chunk's, and its blocks, nothing kept.
  Turns run_blocks(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, Arena& keep,
                   const Continuation* rows, const Sees& see) const;
  void prepare_loads(Exec& ex, const MicroBatch& batch, Arena& keep, Saved& saved) const;
  RoutedTokens routed_tokens(const MicroBatch& batch, std::size_t block) const;
  TensorView previous_loads(Exec& ex, const BalanceConfig& config, std::int64_t experts) const;
};

}  // namespace upmoe

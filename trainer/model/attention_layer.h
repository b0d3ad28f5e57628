#pragma once
// Causal self-attention with rotary positions and grouped key/value heads: qkv, norms of the heads and a limit on all
// of it where the model has them, rope, attention, output projection. Under tp each rank computes its share of the
// heads over all tokens; under cp its share of each sequence, with the keys and values of the others passing by.

#include <optional>

#include "kernels/ops/attention_decode.h"
#include "kernels/ops/norm.h"
#include "trainer/model/linear.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {

// Of tokens whose keys and values are kept for those that come after them. `cache` is this layer's.
struct CachedPlaces {
  KeyCache cache;
  CachedTokens tokens;
  // They are one sequence from its first token on, and what its row of the cache held before is forgotten: they are
  // computed as in training.
  bool begins = false;
  // int32, without shape in all blocks but the last: of the block's outputs those of these N tokens alone are read, and
  // made. Under tp, which divides N, each rank has n of them, in their order.
  ConstTensorView pick_N = {};
};

// Where this rank's T tokens of a micro-batch stand; seq_len is that of the whole sequences. positions_T:
// int32; document_T: int32, without shape when not masked, and then, of whole sequences, where each document's tokens
// begin (AttentionShape::runs).
struct TokenPlaces {
  ConstTensorView positions_T, document_T;
  std::int64_t seq_len = 0;
  std::span<const std::int32_t> runs = {};
  std::optional<CachedPlaces> cached = {};  // given in generation, which has no cp
  bool picks() const { return cached && cached->pick_N.given(); }
};

// Norms of the heads of queries and keys, with a weight for all heads of each. Under tp every rank holds both and adds
// what its own heads give to their gradients.
struct HeadNorms {
  Param q_d, k_d;
  float eps = 1e-6f;
  QkWeights weights() const { return {q_d.value, k_d.value, eps}; }
};

struct AttentionLayer {
  Linear qkv;            // one [H, D] matrix: queries, keys, values of this rank's heads
  Linear output;         // [D, Q]
  AttentionShape shape;  // of this rank's heads; seq_len comes from TokenPlaces
  Communicator *tp = nullptr, *cp = nullptr;
  double rope_theta = 1e6;
  std::optional<HeadNorms> head_norms;
  float clip = 0;  // queries, keys and values are held within +-this; 0: they are not
  struct Saved {
    ConstTensorView x_tD;
    TensorView qkv_TH, out_TQ, lse_TN;
    TensorView heads_TP, rstd_TN;  // with norms: queries and keys before them, as ops::qk_norm_forward says
    TensorView before_TH;          // with a limit: qkv before it
    TokenPlaces places;
  };

  // y_tD: of all of this rank's tokens, or of those of places.cached->pick_N.
  void forward(Exec& ex, TensorView y_tD, ConstTensorView x_tD, const TokenPlaces& places, Arena& keep,
               Saved& saved) const;
  void backward(Exec& ex, TensorView dx_tD, ConstTensorView dy_tD, const Saved& saved) const;

 private:
  AttentionShape shape_of(const TokenPlaces& places) const;
  void norm_heads_backward(Exec& ex, TensorView dqkv_TH, const Saved& saved) const;
  void rope_backward(Exec& ex, TensorView dqkv_TH, const Saved& saved) const;
  void attend(Exec& ex, const Saved& saved) const;
  ConstTensorView picked(Exec& ex, const Saved& saved) const;
  void attend_over_cache(Exec& ex, const Saved& saved) const;
  void attend_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, const Saved& saved) const;
};

}  // namespace upmoe

#pragma once
// Causal self-attention with rotary positions and grouped key/value heads: qkv, rope, attention, output
// projection. Under tp each rank computes its share of the heads over all tokens; under cp its share of each
// sequence, with the keys and values of the others passing by.

#include "kernels/ops/attention.h"
#include "trainer/model/linear.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {

// Where this rank's T tokens of a micro-batch stand; seq_len is that of the whole sequences. positions_T:
// int32; document_T: int32, without shape when not masked.
struct TokenPlaces {
  ConstTensorView positions_T, document_T;
  std::int64_t seq_len = 0;
};

struct AttentionLayer {
  Linear qkv;            // one [H, D] matrix: queries, keys, values of this rank's heads
  Linear output;         // [D, Q]
  AttentionShape shape;  // of this rank's heads; seq_len comes from TokenPlaces
  Communicator *tp = nullptr, *cp = nullptr;
  double rope_theta = 1e6;
  struct Saved {
    ConstTensorView x_tD;
    TensorView qkv_TH, out_TQ, lse_TN;
    TokenPlaces places;
  };

  void forward(Exec& ex, TensorView y_tD, ConstTensorView x_tD, const TokenPlaces& places, Arena& keep,
               Saved& saved) const;
  void backward(Exec& ex, TensorView dx_tD, ConstTensorView dy_tD, const Saved& saved) const;

 private:
  AttentionShape shape_of(const TokenPlaces& places) const;
  void attend(Exec& ex, const Saved& saved) const;
  void attend_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, const Saved& saved) const;
};

}  // namespace upmoe

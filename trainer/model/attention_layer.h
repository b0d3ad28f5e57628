#pragma once
// Causal self-attention with rotary positions and grouped key/value heads: qkv, rope, attention, output
// projection.

#include "kernels/ops/attention.h"
#include "trainer/model/linear.h"

namespace upmoe {

// Where the tokens of a micro-batch stand. positions_T: int32; document_T: int32, without shape when not
// masked.
struct TokenPlaces {
  ConstTensorView positions_T, document_T;
  std::int64_t seq_len = 0;
};

struct AttentionLayer {
  Linear qkv;            // one [H, D] matrix: queries, keys, values
  Linear output;         // [D, Q]
  AttentionShape shape;  // seq_len comes from TokenPlaces
  double rope_theta = 1e6;
  struct Saved {
    ConstTensorView x_TD;
    TensorView qkv_TH, out_TQ, lse_TN;
    TokenPlaces places;
  };

  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenPlaces& places, Arena& keep,
               Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe

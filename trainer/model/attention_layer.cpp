#include "trainer/model/attention_layer.h"

namespace upmoe {

namespace {

AttentionShape shape_for(AttentionShape shape, const TokenPlaces& places) {
  shape.seq_len = places.seq_len;
  return shape;
}

const ConstTensorView* mask_of(const TokenPlaces& places) {
  return places.document_T.shape.rank > 0 ? &places.document_T : nullptr;
}

}  // namespace

void AttentionLayer::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenPlaces& places,
                             Arena& keep, Saved& saved) const {
  const AttentionShape at = shape_for(shape, places);
  const std::int64_t T = x_TD.rows();
  saved.x_TD = x_TD;
  saved.places = places;
  saved.qkv_TH = keep.take({T, at.qkv_width()}, x_TD.dtype, "attention qkv");
  saved.out_TQ = keep.take({T, at.heads * at.head_dim}, x_TD.dtype, "attention output");
  saved.lse_TN = keep.take({T, at.heads}, DType::kF32, "attention log-sum-exp");
  qkv.forward(ex, saved.qkv_TH, x_TD);
  ops::rope(ex, saved.qkv_TH, places.positions_T, at, rope_theta, /*inverse=*/false);
  ops::attention_forward(ex, saved.out_TQ, saved.lse_TN, saved.qkv_TH, at, mask_of(places));
  output.forward(ex, y_TD, saved.out_TQ);
}

void AttentionLayer::backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const {
  const AttentionShape at = shape_for(shape, saved.places);
  ScratchScope scope(*ex.scratch);
  TensorView dout_TQ = ex.scratch->take(saved.out_TQ.shape, saved.out_TQ.dtype, "attention output gradient");
  TensorView dqkv_TH = ex.scratch->take(saved.qkv_TH.shape, saved.qkv_TH.dtype, "attention qkv gradient");
  output.backward(ex, dout_TQ, Accumulate::kOverwrite, dy_TD, saved.out_TQ);
  ops::attention_backward(ex, dqkv_TH, dout_TQ, saved.qkv_TH, saved.out_TQ, saved.lse_TN, at,
                          mask_of(saved.places));
  ops::rope(ex, dqkv_TH, saved.places.positions_T, at, rope_theta, /*inverse=*/true);
  qkv.backward(ex, dx_TD, Accumulate::kOverwrite, dqkv_TH, saved.x_TD);
}

}  // namespace upmoe

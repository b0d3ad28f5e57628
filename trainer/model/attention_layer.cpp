#include "trainer/model/attention_layer.h"

#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "trainer/model/context_ring.h"

namespace upmoe {

// The heads of this rank, and the length of the runs of tokens that a rank along cp has of each sequence.
AttentionShape AttentionLayer::shape_of(const TokenPlaces& places) const {
  AttentionShape at = shape;
  at.seq_len = places.seq_len / cp->size();
  return at;
}

void AttentionLayer::attend_over_cache(Exec& ex, const Saved& saved) const {
  const CachedPlaces& cached = *saved.places.cached;
  ops::store_keys(ex, cached.cache, saved.qkv_TH, cached.tokens, shape);
  if (cached.begins) {
    ops::attention_forward(ex, saved.out_TQ, saved.lse_TN, saved.qkv_TH, shape_of(saved.places));
  } else {
    ops::attention_decode(ex, saved.out_TQ, saved.qkv_TH, cached.cache, cached.tokens, shape);
  }
}

void AttentionLayer::attend(Exec& ex, const Saved& saved) const {
  if (saved.places.cached) return attend_over_cache(ex, saved);
  AttentionShape at = shape;
  at.seq_len = saved.places.seq_len;
  at.runs = saved.places.runs;
  if (cp->size() > 1) {
    ring_attention_forward(ex, *cp, saved.out_TQ, saved.lse_TN, saved.qkv_TH, at, saved.places.document_T);
  } else {
    ops::attention_forward(ex, saved.out_TQ, saved.lse_TN, saved.qkv_TH, at, saved.places.document_T);
  }
}

// What the output's product reads.
ConstTensorView AttentionLayer::picked(Exec& ex, const Saved& saved) const {
  if (!saved.places.picks()) return saved.out_TQ;
  const ConstTensorView& pick_N = saved.places.cached->pick_N;
  const TensorView out_NQ = ex.scratch->take({pick_N.elements(), saved.out_TQ.shape[1]}, saved.out_TQ.dtype,
                                             "attention output of the tokens that are read");
  ops::gather_rows(ex, out_NQ, saved.out_TQ, pick_N, 1);
  return out_NQ;
}

void AttentionLayer::attend_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ,
                                     const Saved& saved) const {
  AttentionShape at = shape;
  at.seq_len = saved.places.seq_len;
  at.runs = saved.places.runs;
  if (cp->size() > 1) {
    ring_attention_backward(ex, *cp, dqkv_TH, dout_TQ, saved.qkv_TH, {saved.out_TQ, saved.lse_TN}, at,
                            saved.places.document_T);
  } else {
    ops::attention_backward(ex, dqkv_TH, dout_TQ, saved.qkv_TH, {saved.out_TQ, saved.lse_TN}, at,
                            saved.places.document_T);
  }
}

void AttentionLayer::norm_heads_backward(Exec& ex, TensorView dqkv_TH, const Saved& saved) const {
  const auto gradient = [&](const Param& w_d) {
    return gradient_or_scratch(ex, w_d, "unwanted norm gradient");
  };
  ops::qk_norm_backward(ex, dqkv_TH, {gradient(head_norms->q_d), gradient(head_norms->k_d)}, saved.heads_TP,
                        saved.rstd_TN, head_norms->weights(), shape);
}

// From the gradients of what attention saw to those of the product's rows, whose sum is that of its bias: made in one
// pass, unless norms of the heads or a limit stand between.
void AttentionLayer::rope_backward(Exec& ex, TensorView dqkv_TH, const Saved& saved) const {
  const AttentionShape at = shape_of(saved.places);
  const ConstTensorView& positions_T = saved.places.positions_T;
  if (!head_norms && clip == 0 && qkv.bias_N && qkv.bias_N->wants_grad()) {
    ops::rope_backward(ex, dqkv_TH, qkv.bias_N->write_grad(), positions_T, at, rope_theta);
    return;
  }
  ops::rope(ex, dqkv_TH, positions_T, at, rope_theta, /*inverse=*/true);
  if (clip > 0) ops::clip_backward(ex, dqkv_TH, saved.before_TH, clip);
  if (head_norms) norm_heads_backward(ex, dqkv_TH, saved);
  qkv.backward_bias(ex, dqkv_TH);
}

// Under tp the layer has all tokens and a part of the heads, while everything around it has a part of the tokens:
//
//   x_tD --all_gather--> x_TD --qkv--> own heads --attention--> --output--> a partial sum --reduce_scatter--> y_tD
//
// The backward is its mirror: what was gathered is reduced and scattered, and the other way round.
void AttentionLayer::forward(Exec& ex, TensorView y_tD, ConstTensorView x_tD, const TokenPlaces& places,
                             Arena& keep, Saved& saved) const {
  const AttentionShape at = shape_of(places);
  const std::int64_t T = x_tD.rows() * tp->size();
  saved.x_tD = x_tD;
  saved.places = places;
  saved.qkv_TH = keep.take({T, at.qkv_width()}, x_tD.dtype, "attention qkv");
  saved.out_TQ = keep.take({T, at.heads * at.head_dim}, x_tD.dtype, "attention output");
  saved.lse_TN = keep.take({T, at.heads}, DType::kF32, "attention log-sum-exp");
  const std::int64_t normed = at.heads + at.kv_heads;
  if (head_norms) {
    saved.heads_TP = keep.take({T, normed * at.head_dim}, x_tD.dtype, "queries and keys before their norms");
    saved.rstd_TN = keep.take({T, normed}, DType::kF32, "rstd of queries and keys");
  }
  if (clip > 0) saved.before_TH = keep.take(saved.qkv_TH.shape, x_tD.dtype, "qkv before the limit");
  const TensorView product_TH = clip > 0 ? saved.before_TH : saved.qkv_TH;
  ScratchScope scope(*ex.scratch);
  qkv.forward(ex, product_TH, gather_tokens(ex, *tp, x_tD));
  if (head_norms)
    ops::qk_norm_forward(ex, product_TH, saved.heads_TP, saved.rstd_TN, head_norms->weights(), at);
  if (clip > 0) ops::clip(ex, saved.qkv_TH, saved.before_TH, clip);
  ops::rope(ex, saved.qkv_TH, places.positions_T, at, rope_theta, /*inverse=*/false);
  attend(ex, saved);
  PartialSum y(ex, *tp, y_tD);
  output.forward(ex, y.partial_TD(), picked(ex, saved));
  y.reduce(ex);
}

void AttentionLayer::backward(Exec& ex, TensorView dx_tD, ConstTensorView dy_tD, const Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  GatheredTokens dy(ex, *tp, dy_tD);
  std::optional<GatheredTokens> x;  // for the gradients of weights
  if (qkv.wants_input()) x.emplace(ex, *tp, saved.x_tD);
  TensorView dout_TQ = ex.scratch->take(saved.out_TQ.shape, saved.out_TQ.dtype, "attention output gradient");
  TensorView dqkv_TH = ex.scratch->take(saved.qkv_TH.shape, saved.qkv_TH.dtype, "attention qkv gradient");
  output.backward(ex, dout_TQ, Accumulate::kOverwrite, dy.finish(), saved.out_TQ);
  attend_backward(ex, dqkv_TH, dout_TQ, saved);
  rope_backward(ex, dqkv_TH, saved);
  PartialSum dx(ex, *tp, dx_tD);
  qkv.backward_products(ex, dx.partial_TD(), Accumulate::kOverwrite, dqkv_TH,
                        x ? x->finish() : ConstTensorView{});
  dx.reduce(ex);
}

}  // namespace upmoe

#include "trainer/model/block.h"

#include "kernels/ops/pointwise.h"

namespace upmoe {

// norm1, attention, residual, norm2: fills saved up to normed2_TD.
void Block::attention_half(Exec& ex, TensorView attended_TD, Arena& keep, Saved& saved) const {
  const ConstTensorView x_TD = saved.x_TD;
  saved.normed1_TD = keep.take(x_TD.shape, x_TD.dtype, "norm1 output");
  saved.h_TD = keep.take(x_TD.shape, x_TD.dtype, "residual after attention");
  saved.normed2_TD = keep.take(x_TD.shape, x_TD.dtype, "norm2 output");
  norm1.forward(ex, saved.normed1_TD, x_TD, keep, saved.norm1);
  attention.forward(ex, attended_TD, saved.normed1_TD, saved.places, keep, saved.attention);
  norm2.forward_add(ex, saved.normed2_TD, saved.h_TD, attended_TD, x_TD, keep, saved.norm2);
}

void Block::ffn_half(Exec& ex, TensorView f_TD, Arena& keep, Saved& saved) const {
  if (const auto* dense = std::get_if<DenseFfn>(&ffn)) {
    saved.ffn = DenseFfn::Saved{};
    dense->forward(ex, f_TD, saved.normed2_TD, keep, std::get<DenseFfn::Saved>(saved.ffn));
    return;
  }
  saved.ffn = MoeLayer::Saved{};
  std::get<MoeLayer>(ffn).forward(ex, f_TD, saved.normed2_TD, saved.balance, keep,
                                  std::get<MoeLayer::Saved>(saved.ffn));
}

void Block::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenPlaces& places, Arena& keep,
                    Saved& saved) const {
  saved.x_TD = x_TD;
  saved.places = places;
  const std::size_t before = keep.mark();
  ScratchScope scope(*ex.scratch);
  TensorView branch_TD = ex.scratch->take(x_TD.shape, x_TD.dtype, "residual branch");
  attention_half(ex, branch_TD, keep, saved);
  const std::size_t before_ffn = keep.mark();
  ffn_half(ex, branch_TD, keep, saved);
  ops::add(ex, y_TD, saved.h_TD, branch_TD);
  // What was kept behind the mark is given up; the views in `saved` are stale until backward runs that half again.
  if (recompute == Recompute::kFfn) keep.rewind(before_ffn);
  if (recompute == Recompute::kBlock) keep.rewind(before);
}

void Block::ffn_backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const {
  if (const auto* dense = std::get_if<DenseFfn>(&ffn)) {
    dense->backward(ex, dx_TD, dy_TD, std::get<DenseFfn::Saved>(saved.ffn));
    return;
  }
  std::get<MoeLayer>(ffn).backward(ex, dx_TD, dy_TD, saved.balance, std::get<MoeLayer::Saved>(saved.ffn));
}

// With h = x + attention(norm1(x)), y = h + ffn(norm2(h)): g is dy on entry; each branch's gradient is added to what
// passes it by, so g becomes dh = dy + norm2'(ffn'(dy)) and then dx, in one buffer.
void Block::backward(Exec& ex, TensorView g_TD, Arena& keep, Saved& saved) const {
  const std::size_t top = keep.mark();
  ScratchScope scope(*ex.scratch);
  TensorView dbranch_TD = ex.scratch->take(g_TD.shape, g_TD.dtype, "residual branch gradient");
  if (recompute == Recompute::kFfn || recompute == Recompute::kBlock) {
    Exec again = not_booked(ex);
    if (recompute == Recompute::kBlock) attention_half(again, dbranch_TD, keep, saved);
    ffn_half(again, dbranch_TD, keep, saved);
  }
  ffn_backward(ex, dbranch_TD, g_TD, saved);
  norm2.backward(ex, g_TD, Accumulate::kAdd, dbranch_TD, saved.norm2);
  attention.backward(ex, dbranch_TD, g_TD, saved.attention);
  norm1.backward(ex, g_TD, Accumulate::kAdd, dbranch_TD, saved.norm1);
  keep.rewind(top);
}

}  // namespace upmoe

#include "trainer/model/block.h"

namespace upmoe {

// norm1, attention, residual, norm2: fills saved up to normed2_TD. `out` says how many tokens go on from there.
void Block::attention_half(Exec& ex, const Output& out, const Residual& x, Arena& keep, Saved& saved) const {
  const auto take = [&](const Shape& shape, const char* what) {
    return keep.take(shape, x.x_TD.dtype, what);
  };
  const TensorView& attended_TD = out.branch_TD;
  saved.normed1_TD = shares_norms() ? out.normed_TD : take(x.x_TD.shape, "norm1 output");
  saved.h_TD = take(attended_TD.shape, "residual after attention");
  saved.normed2_TD =
      shares_norms() ? out.normed_TD.rows(0, attended_TD.rows()) : take(attended_TD.shape, "norm2 output");
  norm1.forward(ex, saved.normed1_TD, x, keep, saved.norm1);
  saved.x_TD = saved.norm1.x_TD;
  attention.forward(ex, attended_TD, saved.normed1_TD, saved.places, keep, saved.attention);
  norm2.forward(ex, saved.normed2_TD,
                {passed_by(ex, attended_TD.shape, keep, saved), attended_TD, saved.h_TD}, keep, saved.norm2);
}

// What attention's output is added to.
ConstTensorView Block::passed_by(Exec& ex, const Shape& shape, Arena& keep, const Saved& saved) const {
  if (!saved.places.picks()) return saved.x_TD;
  const TensorView picked_TD = keep.take(shape, saved.x_TD.dtype, "block input of the tokens that are read");
  pick_tokens(ex, *attention.tp, picked_TD, saved.x_TD, saved.places.cached->pick_N);
  return picked_TD;
}

// A mixture adds up rows anyway, and adds them to the stream; a dense network leaves its branch to the next norm.
Residual Block::ffn_half(Exec& ex, const Output& out, Arena& keep, Saved& saved) const {
  if (const auto* dense = std::get_if<DenseFfn>(&ffn)) {
    saved.ffn = DenseFfn::Saved{};
    dense->forward(ex, out.branch_TD, saved.normed2_TD, keep, std::get<DenseFfn::Saved>(saved.ffn));
    return {saved.h_TD, out.branch_TD, out.y_TD};
  }
  saved.ffn = MoeLayer::Saved{};
  std::get<MoeLayer>(ffn).forward(ex, out.y_TD, saved.normed2_TD, saved.h_TD, saved.balance, keep,
                                  std::get<MoeLayer::Saved>(saved.ffn));
  return {out.y_TD};
}

Residual Block::forward(Exec& ex, const Output& out, const Residual& x, const TokenPlaces& places,
                        Arena& keep, Saved& saved) const {
  saved.places = places;
  const std::size_t before = keep.mark();
  attention_half(ex, out, x, keep, saved);
  const std::size_t before_ffn = keep.mark();
  Residual y = ffn_half(ex, out, keep, saved);
  // What was kept behind the mark is given up; the views in `saved` are stale until backward runs that half again.
  if (recompute == Recompute::kFfn) keep.rewind(before_ffn);
  if (recompute == Recompute::kBlock) {
    y = {summed(ex, y)};  // h goes
    keep.rewind(before);
  }
  return y;
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
  Exec again = not_booked(ex);
  if (recompute == Recompute::kBlock)
    attention_half(again, {dbranch_TD, dbranch_TD}, {saved.x_TD}, keep, saved);
  if (recompute == Recompute::kFfn || recompute == Recompute::kBlock)
    ffn_half(again, {dbranch_TD, dbranch_TD}, keep, saved);
  if (shares_norms()) norm2.again(again, saved.normed2_TD, saved.norm2);
  ffn_backward(ex, dbranch_TD, g_TD, saved);
  norm2.backward(ex, g_TD, Accumulate::kAdd, dbranch_TD, saved.norm2);
  if (shares_norms()) norm1.again(again, saved.normed1_TD, saved.norm1);
  attention.backward(ex, dbranch_TD, g_TD, saved.attention);
  norm1.backward(ex, g_TD, Accumulate::kAdd, dbranch_TD, saved.norm1);
  keep.rewind(top);
}

}  // namespace upmoe

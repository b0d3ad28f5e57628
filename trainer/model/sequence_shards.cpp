#include "trainer/model/sequence_shards.h"

#include "kernels/ops/routing.h"

namespace upmoe {

namespace {

Shape whole_sequence(const Communicator& tp, Shape shape) {
  shape.dim[0] *= tp.size();
  return shape;
}

}  // namespace

// Under way when this returns, so that two of them, or one and other work, go side by side.
GatheredTokens::GatheredTokens(Exec& ex, Communicator& tp, ConstTensorView x_tD) : x_TD_(x_tD) {
  if (tp.size() == 1) return;
  TensorView x_TD = ex.scratch->take(whole_sequence(tp, x_tD.shape), x_tD.dtype, "tokens of all tp ranks");
  pending_ = tp.all_gather(x_TD, x_tD, ex);
  x_TD_ = x_TD;
}

ConstTensorView GatheredTokens::finish() {
  pending_.wait();
  return x_TD_;
}

ConstTensorView gather_tokens(Exec& ex, Communicator& tp, ConstTensorView x_tD) {
  return GatheredTokens(ex, tp, x_tD).finish();
}

void pick_tokens(Exec& ex, Communicator& tp, TensorView out_nD, ConstTensorView x_tD,
                 ConstTensorView pick_N) {
  ScratchScope scope(*ex.scratch);
  const std::int64_t n = out_nD.rows(), first = n * tp.rank();
  ops::gather_rows(ex, out_nD, gather_tokens(ex, tp, x_tD), pick_N.rows(first, first + n), 1);
}

PartialSum::PartialSum(Exec& ex, Communicator& tp, TensorView y_tD)
    : tp_(tp), y_tD_(y_tD), partial_TD_(y_tD) {
  if (tp.size() > 1)
    partial_TD_ = ex.scratch->take(whole_sequence(tp, y_tD.shape), y_tD.dtype, "partial sums of a tp rank");
}

void PartialSum::reduce(Exec& ex) {
  if (tp_.size() > 1) tp_.reduce_scatter(y_tD_, partial_TD_, ex).wait();
}

}  // namespace upmoe

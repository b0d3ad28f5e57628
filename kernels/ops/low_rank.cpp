#include "kernels/ops/low_rank.h"

#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe::ops {

namespace {

void times(Exec& ex, TensorView z, float factor) {
  if (factor != 1) scale(ex, z, factor);
}

TensorView take(Exec& ex, std::int64_t rows, std::int64_t columns, DType dtype, const char* what) {
  return ex.scratch->take({rows, columns}, dtype, what);
}

}  // namespace

void add_low_rank(Exec& ex, TensorView y_TN, ConstTensorView x_TK, const LowRank& w) {
  if (!w.given()) return;
  ScratchScope scope(*ex.scratch);
  const TensorView z_TL = take(ex, x_TK.rows(), w.rank(), x_TK.dtype, "low-rank rows");
  gemm(ex, z_TL, {x_TK}, {w.a, Transpose::kYes}, Accumulate::kOverwrite);
  times(ex, z_TL, w.scale);
  if (!ex.row_by_row) return gemm(ex, y_TN, {z_TL}, {w.b, Transpose::kYes}, Accumulate::kAdd);
  // Fresh products alone give a row the same bits beside any others.
  const TensorView sum_TN = ex.scratch->take(y_TN.shape, y_TN.dtype, "low-rank product");
  gemm(ex, sum_TN, {z_TL}, {w.b, Transpose::kYes}, Accumulate::kOverwrite);
  add(ex, y_TN, y_TN, sum_TN);
}

void low_rank_dgrad(Exec& ex, TensorView dx_TK, TensorView dz_TL, ConstTensorView dy_TN, const LowRank& w) {
  if (!w.given()) return;
  gemm(ex, dz_TL, {dy_TN}, {w.b}, Accumulate::kOverwrite);
  times(ex, dz_TL, w.scale);
  gemm(ex, dx_TK, {dz_TL}, {w.a}, Accumulate::kAdd);
}

void low_rank_wgrad(Exec& ex, const LowRankGradient& dw, ConstTensorView dz_TL, ConstTensorView dy_TN,
                    ConstTensorView x_TK, const LowRank& w) {
  if (!w.given()) return;
  ScratchScope scope(*ex.scratch);
  gemm(ex, dw.a, {dz_TL, Transpose::kYes}, {x_TK}, dw.a.mode);
  const TensorView z_TL = take(ex, x_TK.rows(), w.rank(), x_TK.dtype, "low-rank rows, again");
  Exec again = not_booked(ex);
  gemm(again, z_TL, {x_TK}, {w.a, Transpose::kYes}, Accumulate::kOverwrite);
  times(again, z_TL, w.scale);
  gemm(ex, dw.b, {dy_TN, Transpose::kYes}, {z_TL}, dw.b.mode);
}

// Grouped products overwrite, so the sum is a pass of its own.
void add_low_rank(Exec& ex, TensorView y_RN, ConstTensorView x_RK, const LowRank& w, const ExpertRows& rows) {
  if (!w.given()) return;
  ScratchScope scope(*ex.scratch);
  const TensorView z_RL = take(ex, x_RK.rows(), w.rank(), x_RK.dtype, "low-rank rows"),
                   sum_RN = ex.scratch->take(y_RN.shape, y_RN.dtype, "low-rank product");
  grouped_gemm_forward(ex, z_RL, x_RK, w.a, rows);
  times(ex, z_RL, w.scale);
  grouped_gemm_forward(ex, sum_RN, z_RL, w.b, rows);
  add(ex, y_RN, y_RN, sum_RN);
}

void low_rank_dgrad(Exec& ex, TensorView dx_RK, TensorView dz_RL, ConstTensorView dy_RN, const LowRank& w,
                    const ExpertRows& rows) {
  if (!w.given()) return;
  ScratchScope scope(*ex.scratch);
  const TensorView sum_RK = ex.scratch->take(dx_RK.shape, dx_RK.dtype, "low-rank input gradient");
  grouped_gemm_dgrad(ex, dz_RL, dy_RN, w.b, rows);
  times(ex, dz_RL, w.scale);
  grouped_gemm_dgrad(ex, sum_RK, dz_RL, w.a, rows);
  add(ex, dx_RK, dx_RK, sum_RK);
}

void low_rank_wgrad(Exec& ex, const LowRankGradient& dw, const LowRankRows& o, const LowRank& w,
                    const ExpertRows& rows) {
  if (!w.given()) return;
  ScratchScope scope(*ex.scratch);
  grouped_gemm_wgrad(ex, dw.a, o.dz_RL, o.x_RK, rows, dw.a.mode);
  const TensorView z_RL = take(ex, o.x_RK.rows(), w.rank(), o.x_RK.dtype, "low-rank rows, again");
  Exec again = not_booked(ex);
  grouped_gemm_forward(again, z_RL, o.x_RK, w.a, rows);
  times(again, z_RL, w.scale);
  grouped_gemm_wgrad(ex, dw.b, o.dy_RN, z_RL, rows, dw.b.mode);
}

}  // namespace upmoe::ops

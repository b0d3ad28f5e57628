#include "kernels/ops/distillation.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_rows(const Exec& ex, const DistilledRows& rows) {
  const Shape& shape = rows.logits_CV.shape;
  UPMOE_CHECK(shape.rank == 2 && shape[1] > 0, "logits_CV is {}", shape.str());
  check_tensor(ex, rows.logits_CV, shape, DType::kF32, "logits_CV");
  check_tensor(ex, rows.teacher_CV, shape, DType::kF32, "teacher_CV");
  check_tensor(ex, rows.targets_C, {shape[0]}, DType::kI32, "targets_C");
  UPMOE_CHECK(0 <= rows.shard.begin && rows.shard.begin <= rows.shard.total - shape[1],
              "{} columns from {} of {}", shape[1], rows.shard.begin, rows.shard.total);
}

double bytes_read(const DistilledRows& rows) {
  return bytes_of(rows.logits_CV) + bytes_of(rows.teacher_CV) + bytes_of(rows.targets_C);
}

}  // namespace

void distillation_stats(Exec& ex, TensorView stats_C7, const DistilledRows& rows, double temperature) {
  check_rows(ex, rows);
  check_tensor(ex, stats_C7, {rows.logits_CV.shape[0], kDistillationStats}, DType::kF64, "stats_C7");
  UPMOE_CHECK(temperature > 0, "a temperature of {}", temperature);
  ex.book("distillation_stats", 12.0 * static_cast<double>(rows.logits_CV.elements()), bytes_read(rows),
          bytes_of(stats_C7));
  dispatch(ex, &Backend::distillation_stats, stats_C7, rows, temperature);
}

void distillation_losses(Exec& ex, const DistilledLosses& out, const DistilledRows& rows,
                         ConstTensorView stats_PC7, const Distillation& rule) {
  check_rows(ex, rows);
  const Shape& shape = rows.logits_CV.shape;
  UPMOE_CHECK(stats_PC7.shape.rank == 3 && stats_PC7.shape[0] > 0, "stats_PC7 is {}", stats_PC7.shape.str());
  check_tensor(ex, stats_PC7, {stats_PC7.shape[0], shape[0], kDistillationStats}, DType::kF64, "stats_PC7");
  check_tensor(ex, out.loss_C, {shape[0]}, DType::kF32, "loss_C");
  check_tensor(ex, out.divergence_C, {shape[0]}, DType::kF32, "divergence_C");
  UPMOE_CHECK(rule.temperature > 0, "a temperature of {}", rule.temperature);
  const TensorView& dlogits_CV = out.dlogits_CV;
  const bool gradient = dlogits_CV.given();
  if (gradient) {
    check_float(dlogits_CV, "dlogits_CV");
    check_tensor(ex, dlogits_CV, shape, dlogits_CV.dtype, "dlogits_CV");
    const bool aliases = dlogits_CV.data == rows.logits_CV.data && dlogits_CV.data != nullptr;
    UPMOE_CHECK(!aliases || dlogits_CV.dtype == DType::kF32, "only fp32 dlogits_CV may alias logits_CV");
  }
  ex.book("distillation_losses", gradient ? 12.0 * static_cast<double>(rows.logits_CV.elements()) : 0.0,
          (gradient ? bytes_read(rows) : bytes_of(rows.targets_C)) + bytes_of(stats_PC7),
          bytes_of(out.loss_C) + bytes_of(out.divergence_C) + (gradient ? bytes_of(dlogits_CV) : 0.0));
  dispatch(ex, &Backend::distillation_losses, out, rows, stats_PC7, rule);
}

}  // namespace upmoe::ops

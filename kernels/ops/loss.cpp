#include "kernels/ops/loss.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_logits(const Exec& ex, const ConstTensorView& logits_CV, const ConstTensorView& targets_C) {
  UPMOE_CHECK(logits_CV.shape.rank == 2 && logits_CV.shape[1] > 0, "logits_CV is {}", logits_CV.shape.str());
  check_tensor(ex, logits_CV, logits_CV.shape, DType::kF32, "logits_CV");
  check_tensor(ex, targets_C, {logits_CV.shape[0]}, DType::kI32, "targets_C");
}

void check_results(const Exec& ex, const TokenLosses& out, const ConstTensorView& logits_CV) {
  const TensorView& dlogits_CV = out.dlogits_CV;
  check_tensor(ex, out.loss_C, {logits_CV.shape[0]}, DType::kF32, "loss_C");
  if (!dlogits_CV.given()) return;
  check_float(dlogits_CV, "dlogits_CV");
  check_tensor(ex, dlogits_CV, logits_CV.shape, dlogits_CV.dtype, "dlogits_CV");
  const bool aliases = dlogits_CV.data == logits_CV.data && dlogits_CV.data != nullptr;
  UPMOE_CHECK(!aliases || dlogits_CV.dtype == DType::kF32, "only fp32 dlogits_CV may alias logits_CV");
}

double bytes_written(const TokenLosses& out) {
  return bytes_of(out.loss_C) + (out.dlogits_CV.given() ? bytes_of(out.dlogits_CV) : 0.0);
}

void check_shard(const VocabShard& shard, const ConstTensorView& logits_CV) {
  UPMOE_CHECK(0 <= shard.begin && shard.begin <= shard.total - logits_CV.shape[1], "{} columns from {} of {}",
              logits_CV.shape[1], shard.begin, shard.total);
}

}  // namespace

void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C) {
  check_logits(ex, logits_CV, targets_C);
  check_results(ex, out, logits_CV);
  const double elements = static_cast<double>(logits_CV.elements());
  ex.book("cross_entropy", (out.dlogits_CV.given() ? 6.0 : 4.0) * elements,
          bytes_of(logits_CV) + bytes_of(targets_C), bytes_written(out));
  dispatch(ex, &Backend::cross_entropy, out, logits_CV, targets_C);
}

void cross_entropy_stats(Exec& ex, TensorView stats_C3, ConstTensorView logits_CV, ConstTensorView targets_C,
                         VocabShard shard) {
  check_logits(ex, logits_CV, targets_C);
  check_shard(shard, logits_CV);
  check_tensor(ex, stats_C3, {logits_CV.shape[0], 3}, DType::kF64, "stats_C3");
  ex.book("cross_entropy_stats", 3.0 * static_cast<double>(logits_CV.elements()),
          bytes_of(logits_CV) + bytes_of(targets_C), bytes_of(stats_C3));
  dispatch(ex, &Backend::cross_entropy_stats, stats_C3, logits_CV, targets_C, shard);
}

void cross_entropy_sharded(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                           ConstTensorView targets_C, ConstTensorView stats_PC3, VocabShard shard) {
  check_logits(ex, logits_CV, targets_C);
  check_results(ex, out, logits_CV);
  check_shard(shard, logits_CV);
  UPMOE_CHECK(stats_PC3.shape.rank == 3 && stats_PC3.shape[0] > 0, "stats_PC3 is {}", stats_PC3.shape.str());
  check_tensor(ex, stats_PC3, {stats_PC3.shape[0], logits_CV.shape[0], 3}, DType::kF64, "stats_PC3");
  ex.book("cross_entropy_sharded",
          out.dlogits_CV.given() ? 3.0 * static_cast<double>(logits_CV.elements()) : 0.0,
          (out.dlogits_CV.given() ? bytes_of(logits_CV) : 0.0) + bytes_of(targets_C) + bytes_of(stats_PC3),
          bytes_written(out));
  dispatch(ex, &Backend::cross_entropy_sharded, out, logits_CV, targets_C, stats_PC3, shard);
}

}  // namespace upmoe::ops

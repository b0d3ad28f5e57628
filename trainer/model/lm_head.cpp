#include "trainer/model/lm_head.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <vector>

#include "kernels/ops/gemm.h"
#include "kernels/ops/loss.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/transfer.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {

namespace {

// On a CPU 16 MiB of fp32 logits, half of a last-level cache. On a GPU as many rows as keep a product busy and
// make the weight's gradient, which every chunk reads and writes, a small part of it: up to 4 GiB of logits.
constexpr std::int64_t kChunkElements = std::int64_t{1} << 22, kGpuChunkElements = std::int64_t{1} << 30;

std::int64_t rows_per_chunk(DeviceType device, std::int64_t vocab) {
  if (device == DeviceType::kCpu) return std::max<std::int64_t>(64, kChunkElements / vocab);
  const auto rows = static_cast<std::uint64_t>(std::max<std::int64_t>(64, kGpuChunkElements / vocab));
  return static_cast<std::int64_t>(std::bit_floor(rows));  // whole tiles
}

void show(Exec& ex, const LmHead::Sink& sink, std::int64_t begin, ConstTensorView logits_CV) {
  std::vector<float> host(static_cast<std::size_t>(logits_CV.elements()));
  ops::download(ex, host_view(host.data(), logits_CV.shape), logits_CV);
  sink(begin, host_view(static_cast<const float*>(host.data()), logits_CV.shape));
}

}  // namespace

void LmHead::cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                           ConstTensorView targets_C) const {
  if (tp->size() == 1) {
    ops::cross_entropy(ex, out, logits_CV, targets_C);
    return;
  }
  const std::int64_t C = logits_CV.rows();
  TensorView stats_PC3 = ex.scratch->take({tp->size(), C, 3}, DType::kF64, "logit stats of all ranks");
  TensorView stats_C3 = ex.scratch->take({C, 3}, DType::kF64, "logit stats");
  ops::cross_entropy_stats(ex, stats_C3, logits_CV, targets_C, shard);
  tp->all_gather(stats_PC3, stats_C3, ex).wait();
  ops::cross_entropy_sharded(ex, out, logits_CV, targets_C, stats_PC3, shard);
}

void LmHead::distil(Exec& ex, const DistilledLosses& out, ConstTensorView logits_CV,
                    ConstTensorView targets_C, const SoftTargets& soft, ConstTensorView x_CD) const {
  const std::int64_t C = logits_CV.rows();
  const TensorView teacher_CV = ex.scratch->take(logits_CV.shape, DType::kF32, "logits of the teacher");
  Exec taught = for_teacher(ex);
  ops::gemm(taught, teacher_CV, {x_CD}, {soft.head->weight_VD.value, Transpose::kYes},
            Accumulate::kOverwrite);
  const DistilledRows rows{logits_CV, teacher_CV, targets_C, shard};
  const TensorView stats_PC7 = ex.scratch->take({tp->size(), C, kDistillationStats}, DType::kF64,
                                                "stats of both models, of all ranks");
  const TensorView stats_C7 =
      tp->size() == 1 ? stats_PC7.reshape({C, kDistillationStats})
                      : ex.scratch->take({C, kDistillationStats}, DType::kF64, "stats of both models");
  ops::distillation_stats(ex, stats_C7, rows, soft.rule.temperature);
  if (tp->size() > 1) tp->all_gather(stats_PC7, stats_C7, ex).wait();
  ops::distillation_losses(ex, out, rows, stats_PC7, soft.rule);
}

void LmHead::forward(Exec& ex, const LossSums& sums, ConstTensorView x_tD, const Targets& targets,
                     TensorView dx_tD, float scale, const Sink& sink) const {
  const auto& [targets_T, soft] = targets;
  const auto& [loss_1, divergence_1] = sums;
  ScratchScope outer(*ex.scratch);
  // Each tp rank has every token and a part of the vocabulary, so the gradient of x is a sum over them (dx).
  const ConstTensorView x_TD = gather_tokens(ex, *tp, x_tD);
  std::optional<PartialSum> dx;
  if (dx_tD.given()) dx.emplace(ex, *tp, dx_tD);
  ConstTensorView teacher_TD;
  if (soft) {
    UPMOE_CHECK(soft.head->shard.begin == shard.begin && soft.head->shard.total == shard.total,
                "a teacher's share of another vocabulary");
    Exec taught = for_teacher(ex);
    teacher_TD = gather_tokens(taught, *soft.head->tp, soft.x_tD);
  }
  const std::int64_t T = x_TD.rows(), V = weight_VD.value.shape[0], ranks = tp->size();
  // The same on every rank.
  const std::int64_t chunk = rows_per_chunk(ex.device.type, (shard.total + ranks - 1) / ranks);
  // Logits of all tokens never exist together: a chunk of rows goes through product, loss and both gradients, and its
  // memory serves the next one. In fp32 the gradient is written over the logits.
  for (std::int64_t begin = 0; begin < T; begin += chunk) {
    const std::int64_t end = std::min(T, begin + chunk);
    ScratchScope scope(*ex.scratch);
    TensorView logits_CV = ex.scratch->take({end - begin, V}, DType::kF32, "logits");
    TensorView loss_C = ex.scratch->take({end - begin}, DType::kF32, "token losses");
    ops::gemm(ex, logits_CV, {x_TD.rows(begin, end)}, {weight_VD.value, Transpose::kYes},
              Accumulate::kOverwrite);
    if (sink) show(ex, sink, begin, logits_CV);
    TensorView dlogits_CV;
    if (dx)
      dlogits_CV = x_TD.dtype == DType::kF32
                       ? logits_CV
                       : ex.scratch->take({end - begin, V}, x_TD.dtype, "logit gradient");
    TensorView divergence_C;
    if (soft) {
      divergence_C = ex.scratch->take({end - begin}, DType::kF32, "token divergences");
      distil(ex, {loss_C, divergence_C, dlogits_CV, scale}, logits_CV, targets_T.rows(begin, end), soft,
             teacher_TD.rows(begin, end));
    } else {
      cross_entropy(ex, {loss_C, dlogits_CV, scale}, logits_CV, targets_T.rows(begin, end));
    }
    if (dx) {
      ops::gemm(ex, dx->partial_TD().rows(begin, end), {dlogits_CV}, {weight_VD.value},
                Accumulate::kOverwrite);
      if (weight_VD.wants_grad()) {
        const GradientView dw_VD = weight_VD.write_grad();
        ops::gemm(ex, dw_VD, {dlogits_CV, Transpose::kYes}, {x_TD.rows(begin, end)}, dw_VD.mode);
      }
    }
    if (tp->rank() == 0) ops::sum(ex, loss_1, loss_C);
    if (tp->rank() == 0 && soft) ops::sum(ex, divergence_1, divergence_C);
  }
  if (dx) dx->reduce(ex);
}

TensorView LmHead::logits(Exec& ex, ConstTensorView x_tD, ConstTensorView pick_N, Arena& keep) const {
  const std::int64_t N = pick_N.given() ? pick_N.elements() : x_tD.rows() * tp->size(),
                     v = weight_VD.value.shape[0], V = shard.total > 0 ? shard.total : v;
  const TensorView logits_NV = keep.take({N, V}, DType::kF32, "logits");
  ScratchScope scope(*ex.scratch);
  ConstTensorView x_ND = gather_tokens(ex, *tp, x_tD);
  if (pick_N.given()) {
    const TensorView picked_ND = ex.scratch->take({N, x_ND.shape[1]}, x_ND.dtype, "tokens with logits");
    ops::gather_rows(ex, picked_ND, x_ND, pick_N, 1);
    x_ND = picked_ND;
  }
  const bool alone = tp->size() == 1;
  const TensorView own_Nv = alone ? logits_NV : ex.scratch->take({N, v}, DType::kF32, "logits of a share");
  ops::gemm(ex, own_Nv, {x_ND}, {weight_VD.value, Transpose::kYes}, Accumulate::kOverwrite);
  if (alone) return logits_NV;
  ops::fill(ex, logits_NV, 0.0f);
  ops::copy_columns(ex, logits_NV, shard.begin, own_Nv, 0, v);
  tp->all_reduce(logits_NV, ReduceOp::kSum, ex);  // every logit is of one rank: nothing is rounded
  return logits_NV;
}

}  // namespace upmoe

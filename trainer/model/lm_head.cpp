#include "trainer/model/lm_head.h"

#include <algorithm>

#include "kernels/ops/gemm.h"
#include "kernels/ops/loss.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {

namespace {

constexpr std::int64_t kChunkElements = std::int64_t{1}
                                        << 22;  // 16 MiB of fp32 logits: half of a last-level cache

std::int64_t rows_per_chunk(std::int64_t vocab) {
  return std::max<std::int64_t>(64, kChunkElements / vocab);
}

}  // namespace

void LmHead::forward(Exec& ex, TensorView loss_1, ConstTensorView x_TD, ConstTensorView targets_T,
                     const TensorView* dx_TD, float scale, const Sink& sink) const {
  const std::int64_t T = x_TD.rows(), V = weight_VD.value.shape[0], chunk = rows_per_chunk(V);
  for (std::int64_t begin = 0; begin < T; begin += chunk) {
    const std::int64_t end = std::min(T, begin + chunk);
    ScratchScope scope(*ex.scratch);
    TensorView logits_CV = ex.scratch->take({end - begin, V}, DType::kF32, "logits");
    TensorView loss_C = ex.scratch->take({end - begin}, DType::kF32, "token losses");
    ops::gemm(ex, logits_CV, x_TD.rows(begin, end), Transpose::kNo, weight_VD.value, Transpose::kYes,
              Accumulate::kOverwrite);
    if (sink) sink(begin, logits_CV);
    if (dx_TD == nullptr) {
      ops::cross_entropy(ex, loss_C, nullptr, logits_CV, targets_T.rows(begin, end), scale);
    } else {
      TensorView dlogits_CV = x_TD.dtype == DType::kF32
                                  ? logits_CV
                                  : ex.scratch->take({end - begin, V}, x_TD.dtype, "logit gradient");
      ops::cross_entropy(ex, loss_C, &dlogits_CV, logits_CV, targets_T.rows(begin, end), scale);
      ops::gemm(ex, dx_TD->rows(begin, end), dlogits_CV, Transpose::kNo, weight_VD.value, Transpose::kNo,
                Accumulate::kOverwrite);
      if (weight_VD.wants_grad())
        ops::gemm(ex, weight_VD.grad, dlogits_CV, Transpose::kYes, x_TD.rows(begin, end), Transpose::kNo,
                  Accumulate::kAdd);
    }
    ops::sum(ex, loss_1, loss_C);
  }
}

}  // namespace upmoe

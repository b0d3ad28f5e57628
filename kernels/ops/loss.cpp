#include "kernels/ops/loss.h"

#include "kernels/ops/backend.h"
#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

void cross_entropy(Exec& ex, TensorView loss_C, const TensorView* dlogits_CV, ConstTensorView logits_CV,
                   ConstTensorView targets_C, float scale) {
  UPMOE_CHECK(logits_CV.shape.rank == 2 && logits_CV.shape[1] > 0, "logits_CV is {}", logits_CV.shape.str());
  check_tensor(ex, logits_CV, logits_CV.shape, DType::kF32, "logits_CV");
  const std::int64_t rows = logits_CV.shape[0];
  check_tensor(ex, loss_C, {rows}, DType::kF32, "loss_C");
  check_tensor(ex, targets_C, {rows}, DType::kI32, "targets_C");
  if (dlogits_CV != nullptr) {
    check_float(*dlogits_CV, "dlogits_CV");
    check_tensor(ex, *dlogits_CV, logits_CV.shape, dlogits_CV->dtype, "dlogits_CV");
    const bool aliases = dlogits_CV->data == logits_CV.data && dlogits_CV->data != nullptr;
    UPMOE_CHECK(!aliases || dlogits_CV->dtype == DType::kF32, "only fp32 dlogits_CV may alias logits_CV");
  }
  const double elements = static_cast<double>(logits_CV.elements());
  ex.book("cross_entropy", (dlogits_CV != nullptr ? 6.0 : 4.0) * elements,
          bytes_of(logits_CV) + bytes_of(targets_C),
          bytes_of(loss_C) + (dlogits_CV != nullptr ? bytes_of(*dlogits_CV) : 0.0));
  dispatch(ex, cpu::cross_entropy, cuda::cross_entropy, loss_C, dlogits_CV, logits_CV, targets_C, scale);
}

}  // namespace upmoe::ops

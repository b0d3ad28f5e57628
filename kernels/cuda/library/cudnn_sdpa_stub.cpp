// A build without cuDNN: the portable kernel computes all attention.

#include "kernels/cuda/library/cudnn_sdpa.h"

#include <atomic>

#include "kernels/core/log.h"

namespace upmoe::cuda {

bool sdpa_takes(const Exec&, const AttentionShape&, std::int64_t, DType dtype) {
  static std::atomic<bool> told{false};
  if (dtype == DType::kBF16 && !told.exchange(true))
    log::warning(
        "attention in bf16: the portable kernel computes it, which is slow: this program was built without "
        "cuDNN or its frontend's headers (launch/setup.sh puts those into .venv)");
  return false;
}
std::string sdpa_refusal(const AttentionShape&, std::int64_t, bool, int) {
  return "this program was built without cuDNN";
}
void sdpa_forward(Exec&, TensorView, TensorView, ConstTensorView, const AttentionShape&) {
  UPMOE_CHECK(false, "this program was built without cuDNN");
}
void sdpa_backward(Exec&, TensorView, ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                   const AttentionShape&) {
  UPMOE_CHECK(false, "this program was built without cuDNN");
}

}  // namespace upmoe::cuda

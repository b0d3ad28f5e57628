// A build without cuDNN: the portable kernel computes all attention.

#include "kernels/cuda/cudnn_sdpa.h"

namespace upmoe::cuda {

bool sdpa_takes(const Exec&, const AttentionShape&, std::int64_t, DType) {
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

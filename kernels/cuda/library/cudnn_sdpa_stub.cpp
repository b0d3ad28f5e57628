// A build without cuDNN: no choice comes here (kernels/cuda/choose/attention.h).

#include "kernels/cuda/library/cudnn_sdpa.h"

namespace upmoe::cuda {

namespace {

constexpr const char* kWhy = "this program was built without cuDNN";

}  // namespace

bool has_cudnn() {
  return false;
}
std::size_t cudnn_version() {
  return 0;
}
std::string sdpa_refusal(const Exec&, const AttentionShape&, std::int64_t) {
  return kWhy;
}
std::string sdpa_refusal(const AttentionShape&, std::int64_t, bool, int) {
  return kWhy;
}
std::int64_t sdpa_workspace() {
  return 0;
}
void limit_sdpa_workspace(std::int64_t) {}
void sdpa_forward(Exec&, TensorView, TensorView, ConstTensorView, const AttentionShape&) {
  UPMOE_CHECK(false, "{}", kWhy);
}
void sdpa_backward(Exec&, TensorView, ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView,
                   const AttentionShape&) {
  UPMOE_CHECK(false, "{}", kWhy);
}
void sdpa_forward(Exec&, TensorView, TensorView, ConstTensorView, const AttentionShape&, const DocumentSlice&,
                  const DocumentTable&) {
  UPMOE_CHECK(false, "{}", kWhy);
}
void sdpa_backward(Exec&, TensorView, ConstTensorView, const SdpaSaved&, const AttentionShape&,
                   const DocumentSlice&, const DocumentTable&) {
  UPMOE_CHECK(false, "{}", kWhy);
}

}  // namespace upmoe::cuda

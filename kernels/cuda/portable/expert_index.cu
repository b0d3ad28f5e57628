#include "kernels/cuda/portable/expert_index.h"

#include "kernels/cuda/portable/expert_place.cuh"
#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

namespace {

__global__ void row_tokens_kernel(std::int32_t* token, const std::int32_t* index, std::int32_t divisor,
                                  std::int64_t rows) {
  const std::int64_t i = global_thread();
  if (i < rows) token[i] = index != nullptr ? index[i] / divisor : static_cast<std::int32_t>(i);
}

// One block, a thread for each expert: its place is the number of those before it.
__global__ void rank_experts_kernel(std::int32_t* ranking, const std::int32_t* offset, int experts) {
  const int e = static_cast<int>(threadIdx.x);
  if (e >= experts) return;
  const int place = place_by_rows(e, offset, experts);
  ranking[place] = e;
}

__global__ void sum_parts_kernel(float* sum, const float* parts, std::int64_t rows, int each) {
  const std::int64_t i = global_thread();
  if (i >= rows) return;
  float s = 0.0f;
  for (int p = 0; p < each; ++p) s += parts[i * each + p];
  sum[i] = s;
}

}  // namespace

void row_tokens(const Exec& ex, const TensorView& token_R, const ConstTensorView& index_R,
                std::int64_t divisor) {
  const std::int64_t rows = token_R.elements();
  launch(ex, blocks_for(rows, kThreads), kThreads, row_tokens_kernel, token_R.as<std::int32_t>(),
         index_R.if_given<std::int32_t>(), static_cast<std::int32_t>(divisor), rows);
}

void rank_experts(const Exec& ex, const TensorView& ranking_e, const ConstTensorView& offset_e1) {
  const std::int64_t experts = ranking_e.elements();
  UPMOE_CHECK(experts <= 1024, "{} experts", experts);
  launch(ex, 1, static_cast<unsigned>((experts + kWarp - 1) / kWarp * kWarp), rank_experts_kernel,
         ranking_e.as<std::int32_t>(), offset_e1.as<std::int32_t>(), static_cast<int>(experts));
}

void sum_parts(const Exec& ex, const TensorView& sum_R, const ConstTensorView& parts_RP) {
  launch(ex, blocks_for(sum_R.elements(), kThreads), kThreads, sum_parts_kernel, sum_R.as<float>(),
         parts_RP.as<float>(), sum_R.elements(), static_cast<int>(parts_RP.shape[1]));
}

}  // namespace upmoe::cuda

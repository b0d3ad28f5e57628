#include "kernels/cuda/sm90/cross_entropy.cuh"

#include "kernels/cuda/sm90/cluster_launch.cuh"
#include "kernels/cuda/sm90/cross_entropy_row.cuh"

namespace upmoe::cuda::sm90 {

static_assert(sizeof(RowShared) <= 1024, "choose/cross_entropy.cpp counts with that");

template <class T>
void cross_entropy(const CrossEntropyLaunch& l, float* loss, T* dlogits, const float* logits,
                   const std::int32_t* targets) {
  launch_clusters({l.stream, l.rows * l.blocks, kRowThreads, l.blocks, row_shared_bytes(l.columns, l.blocks)},
                  cross_entropy_row_kernel<T>, loss, dlogits,
                  CrossEntropyRows{logits, targets, l.columns, l.blocks, l.scale});
}

template void cross_entropy(const CrossEntropyLaunch&, float*, float*, const float*, const std::int32_t*);
template void cross_entropy(const CrossEntropyLaunch&, float*, bf16*, const float*, const std::int32_t*);

}  // namespace upmoe::cuda::sm90

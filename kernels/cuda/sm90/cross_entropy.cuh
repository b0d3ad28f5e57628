#pragma once
// Cross-entropy with its gradient as a function of the host: a cluster for each row. It enqueues and returns.

#include <cuda_runtime.h>

#include <cstdint>

namespace upmoe::cuda::sm90 {

constexpr int kShares = 8;  // of a row, at most: a place for each in a block's memory

struct CrossEntropyLaunch {
  cudaStream_t stream = nullptr;
  int rows = 0, columns = 0;  // rows > 0; columns a multiple of 4
  int blocks = 0;             // that share a row: 1, 2, 4 or 8, and their shared memory holds it
  float scale = 1;
};

// loss [rows], dlogits and logits [rows, columns], at addresses of whole packs of four; T is float, where dlogits may
// be logits, or bf16. A target that is no column: 0 and zeros.
template <class T>
void cross_entropy(const CrossEntropyLaunch& l, float* loss, T* dlogits, const float* logits,
                   const std::int32_t* targets);

}  // namespace upmoe::cuda::sm90

#pragma once
// cuBLASLt as this project uses it: row-major products on a stream, with the algorithm of each shape chosen once.

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/core/product_algorithms.h"
#include "kernels/cuda/runtime/stream.cuh"
#include "kernels/ops/gemm.h"

struct cublasLtContext;

namespace upmoe::cuda {

// c [M, N] (+)= op(a) op(b) [+ bias], everything contiguous; see ops::gemm. M, N and K are at least 1.
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  Transpose transpose_a = Transpose::kNo, transpose_b = Transpose::kNo;
  DType in = DType::kF32, out = DType::kF32;
  Accumulate mode = Accumulate::kOverwrite;
  const void *a = nullptr, *b = nullptr;
  void* c = nullptr;
  const void* bias = nullptr;                     // of the dtype `out`
  const ProductAlgorithms* algorithms = nullptr;  // which algorithm; null: the library's first
};

std::size_t cublaslt_version();  // 130002 for 13.0.2

// Kept by a stream, its owner (CudaStream::kept).
class GemmLibrary {
 public:
  explicit GemmLibrary(const CudaStream& owner);
  ~GemmLibrary();
  GemmLibrary(const GemmLibrary&) = delete;

  void multiply(const Product& p) { multiply(p, owner_, 0); }

  // Products of experts: they set out together behind the work that the owner has been given, side by side on
  // several streams, and what the owner is given after join() comes behind all of them. Their rows (m, or k
  // where a is transposed) are other ones at every step; an algorithm is chosen for rounded numbers of rows,
  // so that choosing ends, and a product's bits depend on its shape and on where its tensors begin.
  static constexpr int kSideStreams = 6;
  void fork();
  void multiply_beside(const Product& p);
  void join();

 private:
  struct Plan;
  struct Side {
    cudaStream_t stream = nullptr;
    cudaEvent_t done = nullptr;
    bool used = false;
  };
  const Plan& plan_of(const Product& p);
  int place_of(const Product& p) const;
  void choose(Plan& plan, const Product& p, int place);
  void multiply(const Product& p, cudaStream_t stream, int workspace);
  int run(const Plan& plan, const Product& p, cudaStream_t stream, int workspace);
  void* workspace(int index);

  using Key = std::array<std::int64_t, 13>;
  cudaStream_t owner_;
  ProductLibrary library_;
  cublasLtContext* handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::array<void*, kSideStreams + 1> workspaces_{};  // the owner's first
  std::array<Side, kSideStreams> sides_;
  cudaEvent_t forked_ = nullptr;
  int next_ = 0;
};

}  // namespace upmoe::cuda

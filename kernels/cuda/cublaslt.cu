#include "kernels/cuda/cublaslt.cuh"

#include <cublasLt.h>

#include <algorithm>

#include "kernels/core/gpu.h"

namespace upmoe::cuda {

namespace {

constexpr std::size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

void check_lt(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ExitCode::kDevice, "cuBLASLt: {} failed: {} (status {})", what, cublasLtGetStatusString(status),
         static_cast<int>(status));
}

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

// Bytes that divide the address, as far as cuBLASLt cares.
std::uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p) | 256;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

struct Layout {
  cublasLtMatrixLayout_t raw = nullptr;
  Layout(DType dtype, std::int64_t rows, std::int64_t columns) {
    check_lt(cublasLtMatrixLayoutCreate(&raw, type_of(dtype), static_cast<std::uint64_t>(rows),
                                        static_cast<std::uint64_t>(columns), rows),
             "cublasLtMatrixLayoutCreate");
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(raw); }
  Layout(const Layout&) = delete;
};

struct Preference {
  cublasLtMatmulPreference_t raw = nullptr;
  Preference() { check_lt(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate"); }
  ~Preference() { cublasLtMatmulPreferenceDestroy(raw); }
  Preference(const Preference&) = delete;
  template <class T>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check_lt(cublasLtMatmulPreferenceSetAttribute(raw, attribute, &value, sizeof value),
             "cublasLtMatmulPreferenceSetAttribute");
  }
};

}  // namespace

// cuBLASLt is column-major: what lies row-major as [rows, columns] it sees as columns x rows. So it computes
// the transposed product, c^T = op(b)^T op(a)^T, with the roles of a and b exchanged.
struct GemmLibrary::Plan {
  cublasLtMatmulDesc_t description = nullptr;
  Layout left, right, result;
  cublasLtMatmulAlgo_t algorithm{};

  explicit Plan(const Product& p)
      : left(p.in, p.transpose_b == Transpose::kNo ? p.n : p.k, p.transpose_b == Transpose::kNo ? p.k : p.n),
        right(p.in, p.transpose_a == Transpose::kNo ? p.k : p.m, p.transpose_a == Transpose::kNo ? p.m : p.k),
        result(p.out, p.n, p.m) {
    check_lt(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescCreate");
    const auto operation = [](Transpose t) { return t == Transpose::kNo ? CUBLAS_OP_N : CUBLAS_OP_T; };
    set(CUBLASLT_MATMUL_DESC_TRANSA, operation(p.transpose_b));
    set(CUBLASLT_MATMUL_DESC_TRANSB, operation(p.transpose_a));
    if (p.bias != nullptr) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  }
  ~Plan() { cublasLtMatmulDescDestroy(description); }
  Plan(const Plan&) = delete;
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check_lt(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value),
             "cublasLtMatmulDescSetAttribute");
  }
};

GemmLibrary::GemmLibrary() {
  check_lt(cublasLtCreate(&handle_), "cublasLtCreate");
  check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
  for (Side& side : sides_) {
    check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
    check(cudaEventCreateWithFlags(&side.done, cudaEventDisableTiming));
  }
}

GemmLibrary::~GemmLibrary() {
  for (Side& side : sides_) {
    cudaStreamSynchronize(side.stream);
    cudaStreamDestroy(side.stream);
    cudaEventDestroy(side.done);
  }
  cudaEventDestroy(forked_);
  for (void* w : workspaces_)
    if (w != nullptr) gpu::release(static_cast<std::byte*>(w));
  plans_.clear();
  cublasLtDestroy(handle_);
}

void* GemmLibrary::workspace(int index) {
  void*& w = workspaces_[static_cast<std::size_t>(index)];
  if (w == nullptr) w = gpu::allocate(kWorkspaceBytes, "cuBLASLt workspaces");
  return w;
}

// The heuristics' first choice, so that every run and every rank computes the same bits. Sums of split
// products go through the workspace, in order.
const GemmLibrary::Plan& GemmLibrary::plan_of(const Product& p) {
  const Key key{p.m,
                p.n,
                p.k,
                static_cast<std::int64_t>(p.transpose_a),
                static_cast<std::int64_t>(p.transpose_b),
                static_cast<std::int64_t>(p.in),
                static_cast<std::int64_t>(p.out),
                static_cast<std::int64_t>(p.mode),
                p.bias != nullptr ? alignment_of(p.bias) : 0,
                alignment_of(p.a),
                alignment_of(p.b),
                alignment_of(p.c)};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan != nullptr) return *plan;
  auto made = std::make_unique<Plan>(p);
  Preference preference;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, made->description, made->left.raw, made->right.raw,
                                     made->result.raw, made->result.raw, preference.raw, 1, &found, &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0)
    fail(ExitCode::kDevice, "cuBLASLt has no algorithm for a product of {} x {} x {}, {} to {}: {}", p.m, p.n,
         p.k, name_of(p.in), name_of(p.out), cublasLtGetStatusString(status));
  made->algorithm = found.algo;
  plan = std::move(made);
  return *plan;
}

void GemmLibrary::multiply(const Product& p, cudaStream_t stream, int workspace_index) {
  const Plan& plan = plan_of(p);
  if (p.bias != nullptr)
    check_lt(cublasLtMatmulDescSetAttribute(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias,
                                            sizeof p.bias),
             "cublasLtMatmulDescSetAttribute");
  const float alpha = 1, beta = p.mode == Accumulate::kAdd ? 1.0f : 0.0f;
  check_lt(cublasLtMatmul(handle_, plan.description, &alpha, p.b, plan.left.raw, p.a, plan.right.raw, &beta,
                          p.c, plan.result.raw, p.c, plan.result.raw, &plan.algorithm,
                          workspace(workspace_index), kWorkspaceBytes, stream),
           "cublasLtMatmul");
}

void GemmLibrary::fork(cudaStream_t stream) {
  check(cudaEventRecord(forked_, stream));
  for (Side& side : sides_) side.used = false;
  next_ = 0;
}

void GemmLibrary::multiply_beside(const Product& p) {
  Side& side = sides_[static_cast<std::size_t>(next_)];
  if (!side.used) check(cudaStreamWaitEvent(side.stream, forked_, 0));
  side.used = true;
  multiply(p, side.stream, next_ + 1);
  next_ = (next_ + 1) % kSideStreams;
}

void GemmLibrary::join(cudaStream_t stream) {
  for (Side& side : sides_) {
    if (!side.used) continue;
    check(cudaEventRecord(side.done, side.stream));
    check(cudaStreamWaitEvent(stream, side.done, 0));
  }
}

GemmLibrary& CudaStream::gemm() {
  if (gemm_ == nullptr) gemm_ = std::make_shared<GemmLibrary>();
  return *gemm_;
}

}  // namespace upmoe::cuda

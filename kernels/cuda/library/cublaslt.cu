#include "kernels/cuda/library/cublaslt.cuh"

#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <utility>

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
  Layout(DType dtype, const std::int64_t (&size)[2]) {
    check_lt(cublasLtMatrixLayoutCreate(&raw, type_of(dtype), static_cast<std::uint64_t>(size[0]),
                                        static_cast<std::uint64_t>(size[1]), size[0]),
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
  cublasLtMatmulAlgo_t algorithm{};

  explicit Plan(const Product& p) {
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

namespace {

struct Sizes {
  std::int64_t left[2], right[2], result[2];  // rows and columns, as cuBLASLt sees them
  explicit Sizes(const Product& p) : left{p.n, p.k}, right{p.k, p.m}, result{p.n, p.m} {
    if (p.transpose_b == Transpose::kYes) std::swap(left[0], left[1]);
    if (p.transpose_a == Transpose::kYes) std::swap(right[0], right[1]);
  }
};

// For how many rows an expert's algorithm is chosen: powers of two, then whole pairs of a tile's 128 rows.
std::int64_t rounded_rows(std::int64_t rows) {
  if (rows <= 256) return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(rows)));
  return (rows + 255) / 256 * 256;
}

// An address that is aligned as every row of these many bytes is, from `p` on: where an expert's rows begin
// depends on how many the others have.
const void* aligned_as_rows(const void* p, std::int64_t elements, DType dtype) {
  const auto row = static_cast<std::uintptr_t>(elements) * size_of(dtype);
  return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) | row);
}

// What the algorithm of an expert's product is chosen for; its addresses are for their alignment alone.
Product for_rounded_rows(Product p) {
  p.a = aligned_as_rows(p.a, p.transpose_a == Transpose::kYes ? p.m : p.k, p.in);
  p.b = aligned_as_rows(p.b, p.transpose_b == Transpose::kYes ? p.k : p.n, p.in);
  p.c = const_cast<void*>(aligned_as_rows(p.c, p.n, p.out));
  std::int64_t& rows = p.transpose_a == Transpose::kYes ? p.k : p.m;
  rows = rounded_rows(rows);
  return p;
}

}  // namespace

std::size_t cublaslt_version() {
  return cublasLtGetVersion();
}

GemmLibrary::GemmLibrary(const CudaStream& owner) : owner_(owner.raw()), library_(gpu::product_library()) {
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

// The place of its algorithm among those that the heuristics offer, by the table.
int GemmLibrary::place_of(const Product& p) const {
  if (p.algorithms == nullptr) return 0;
  std::int64_t alignment = std::min({alignment_of(p.a), alignment_of(p.b), alignment_of(p.c)});
  if (p.bias != nullptr) alignment = std::min<std::int64_t>(alignment, alignment_of(p.bias));
  return upmoe::choose(*p.algorithms, library_,
                       {.m = p.m,
                        .n = p.n,
                        .k = p.k,
                        .transpose_a = p.transpose_a == Transpose::kYes,
                        .transpose_b = p.transpose_b == Transpose::kYes,
                        .in = p.in,
                        .out = p.out,
                        .adds = p.mode == Accumulate::kAdd,
                        .bias = p.bias != nullptr,
                        .alignment = alignment});
}

// The heuristics' first choice or the table's, so that every run and every rank computes the same bits. Sums of split
// products go through the workspace, in order.
const GemmLibrary::Plan& GemmLibrary::plan_of(const Product& p) {
  const int place = place_of(p);
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
                alignment_of(p.c),
                place};
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan != nullptr) return *plan;
  auto made = std::make_unique<Plan>(p);
  choose(*made, p, place);
  plan = std::move(made);
  return *plan;
}

void GemmLibrary::choose(Plan& plan, const Product& p, int place) {
  const Sizes sizes(p);
  const Layout left(p.in, sizes.left), right(p.in, sizes.right), result(p.out, sizes.result);
  Preference preference;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
  std::array<cublasLtMatmulHeuristicResult_t, kOfferedAlgorithms> found{};
  int count = 0;
  const int asked = place == 0 ? 1 : kOfferedAlgorithms;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, plan.description, left.raw, right.raw, result.raw, result.raw,
                                     preference.raw, asked, found.data(), &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0)
    fail(ExitCode::kDevice, "cuBLASLt has no algorithm for a product of {} x {} x {}, {} to {}: {}", p.m, p.n,
         p.k, name_of(p.in), name_of(p.out), cublasLtGetStatusString(status));
  if (place >= count)
    fail(ExitCode::kDevice,
         "the table of algorithms (configs/cuda/product_algorithms.yaml) names number "
         "{} for a product of {} x {} x {}, {} to {}, on {}; cuBLASLt {} offers {} "
         "there: take its line out, or write the table again with time_algorithms",
         place, p.m, p.n, p.k, name_of(p.in), name_of(p.out), library_.device, library_.version, count);
  plan.algorithm = found[static_cast<std::size_t>(place)].algo;
}

int GemmLibrary::run(const Plan& plan, const Product& p, cudaStream_t stream, int workspace_index) {
  const Sizes sizes(p);
  const Layout left(p.in, sizes.left), right(p.in, sizes.right), result(p.out, sizes.result);
  if (p.bias != nullptr)
    check_lt(cublasLtMatmulDescSetAttribute(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias,
                                            sizeof p.bias),
             "cublasLtMatmulDescSetAttribute");
  const float alpha = 1, beta = p.mode == Accumulate::kAdd ? 1.0f : 0.0f;
  return cublasLtMatmul(handle_, plan.description, &alpha, p.b, left.raw, p.a, right.raw, &beta, p.c,
                        result.raw, p.c, result.raw, &plan.algorithm, workspace(workspace_index),
                        kWorkspaceBytes, stream);
}

void GemmLibrary::multiply(const Product& p, cudaStream_t stream, int workspace_index) {
  check_lt(static_cast<cublasStatus_t>(run(plan_of(p), p, stream, workspace_index)), "cublasLtMatmul");
}

void GemmLibrary::fork() {
  check(cudaEventRecord(forked_, owner_));
  for (Side& side : sides_) side.used = false;
  next_ = 0;
}

// The experts' products of one op, beside each other; small ones alone would leave most of a GPU idle:
//
//   owner    --forked_--> .......................... <-- waits for every `done` -->
//   side 0     waits - expert 0 - expert 4 - done
//   side 1     waits - expert 1 - expert 5 - done
//   ...
//
// Each side has a workspace of its own, as products on different streams may run at once.
void GemmLibrary::multiply_beside(const Product& p) {
  Side& side = sides_[static_cast<std::size_t>(next_)];
  if (!side.used) check(cudaStreamWaitEvent(side.stream, forked_, 0));
  side.used = true;
  // Rows per expert differ in every step; asking the heuristics for each number would cost more than the products. The
  // algorithm for the rounded number and the least alignment takes any of them, and plans stay few.
  const Product rounded = for_rounded_rows(p);
  const auto status = static_cast<cublasStatus_t>(run(plan_of(rounded), p, side.stream, next_ + 1));
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
    // Not for these rows: theirs is chosen too, and what is wrong with the product itself shows there.
    multiply(p, side.stream, next_ + 1);
  } else {
    check_lt(status, "cublasLtMatmul");
  }
  next_ = (next_ + 1) % kSideStreams;
}

void GemmLibrary::join() {
  for (Side& side : sides_) {
    if (!side.used) continue;
    check(cudaEventRecord(side.done, side.stream));
    check(cudaStreamWaitEvent(owner_, side.done, 0));
  }
}

}  // namespace upmoe::cuda

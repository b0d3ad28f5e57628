#include <algorithm>
#include <mutex>
#include <vector>

#include "kernels/core/bf16.h"
#include "tests/support/fake_cuda/cublasLt.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/fake_cuda/fake_world.h"

struct cublasLtContext {};
struct FakeLayout {
  cudaDataType_t type;
  std::int64_t rows, columns, leading;
};
struct FakeMatmul {
  cublasOperation_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
};
struct FakePreference {
  std::uint32_t alignment[4] = {256, 256, 256, 256};
  std::size_t workspace = 0;
};

namespace {

std::mutex mutex;
std::vector<fake_cuda::Matmul> matmuls;
int heuristics = 0;

float element(const void* data, cudaDataType_t type, std::int64_t i) {
  return type == CUDA_R_16BF ? upmoe::to_float(static_cast<const upmoe::bf16*>(data)[i])
                             : static_cast<const float*>(data)[i];
}

struct Operand {
  const void* data;
  FakeLayout layout;
  bool transposed;
  std::int64_t rows() const { return transposed ? layout.columns : layout.rows; }
  std::int64_t columns() const { return transposed ? layout.rows : layout.columns; }
  // All of it, one column behind the other.
  std::vector<double> by_columns() const {
    std::vector<double> all(static_cast<std::size_t>(rows() * columns()));
    std::size_t i = 0;
    for (std::int64_t column = 0; column < columns(); ++column)
      for (std::int64_t row = 0; row < rows(); ++row)
        all[i++] = static_cast<double>(element(
            data, layout.type, transposed ? column + row * layout.leading : row + column * layout.leading));
    return all;
  }
};

// Every GPU library sums in some order of its own; this one in rising order, in fp64.
void multiply(const Operand& a, const Operand& b, const FakeLayout& d, void* out, float alpha, float beta,
              const void* bias) {
  const std::int64_t rows = a.rows(), steps = a.columns();
  const std::vector<double> a_columns = a.by_columns(), b_columns = b.by_columns();
  std::vector<double> sums(static_cast<std::size_t>(rows));
  for (std::int64_t column = 0; column < b.columns(); ++column) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (std::int64_t k = 0; k < steps; ++k) {  // all rows' sums side by side
      const double* a_column = a_columns.data() + k * rows;
      const double factor = b_columns[static_cast<std::size_t>(k + column * steps)];
      for (std::int64_t row = 0; row < rows; ++row)
        sums[static_cast<std::size_t>(row)] += a_column[row] * factor;
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t i = row + column * d.leading;
      float value = alpha * static_cast<float>(sums[static_cast<std::size_t>(row)]);
      if (beta != 0) value += beta * element(out, d.type, i);
      if (bias != nullptr) value += element(bias, d.type, row);
      if (d.type == CUDA_R_16BF) {
        static_cast<upmoe::bf16*>(out)[i] = upmoe::to_bf16(value);
      } else {
        static_cast<float*>(out)[i] = value;
      }
    }
  }
}

}  // namespace

namespace fake_cuda {
std::vector<Matmul> take_matmuls() {
  const std::lock_guard lock(mutex);
  return std::exchange(matmuls, {});
}
int heuristic_calls() {
  const std::lock_guard lock(mutex);
  return heuristics;
}
}  // namespace fake_cuda

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
std::size_t cublasLtGetVersion() {
  return 130100;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type,
                                          std::uint64_t rows, std::uint64_t columns, std::int64_t leading) {
  if (rows == 0 || columns == 0 || leading < static_cast<std::int64_t>(rows))
    return CUBLAS_STATUS_INVALID_VALUE;
  *layout =
      new FakeLayout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns), leading};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t,
                                        cudaDataType_t) {
  *description = new FakeMatmul;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete description;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              std::size_t bytes) {
  const auto set = [&](auto& field) {
    if (bytes != sizeof field) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(d->transpose_a);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(d->transpose_b);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(d->epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(d->bias);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new FakePreference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, std::size_t bytes) {
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && bytes == sizeof p->workspace)
    std::memcpy(&p->workspace, value, bytes);
  else if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES && bytes == sizeof p->alignment[0])
    std::memcpy(&p->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
  else if (attribute != CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK || bytes != 4)
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}
// The alignments that were promised are the algorithm; the product holds them against the addresses.
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatmulPreference_t preference,
                                              int wanted, cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  *found = 0;
  if (fake_cuda::planted("cublasLtMatmulAlgoGetHeuristic") != cudaSuccess || wanted < 1)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  const std::lock_guard lock(mutex);
  ++heuristics;
  *found = std::min(wanted, 4);
  for (int place = 0; place < *found; ++place) {
    cublasLtMatmulHeuristicResult_t& result = results[place];
    for (int i = 0; i < 4; ++i) result.algo.data[i] = preference->alignment[i];
    result.algo.data[4] = preference->workspace;
    result.algo.data[5] = static_cast<std::uint64_t>(place);
    result.state = CUBLAS_STATUS_SUCCESS;
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t stream) {
  if (fake_cuda::planted("cublasLtMatmul") != cudaSuccess) return CUBLAS_STATUS_NOT_SUPPORTED;
  const Operand left{a, *a_layout, description->transpose_a == CUBLAS_OP_T},
      right{b, *b_layout, description->transpose_b == CUBLAS_OP_T};
  if (left.columns() != right.rows() || left.rows() != d_layout->rows ||
      right.columns() != d_layout->columns || c != d || c_layout != d_layout ||
      a_layout->type != b_layout->type)
    return CUBLAS_STATUS_INVALID_VALUE;
  const void* operands[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (reinterpret_cast<std::uintptr_t>(operands[i]) % algorithm->data[i] != 0)
      return CUBLAS_STATUS_INVALID_VALUE;
  if (workspace == nullptr || workspace_bytes < algorithm->data[4]) return CUBLAS_STATUS_INVALID_VALUE;
  const float alpha_value = *static_cast<const float*>(alpha), beta_value = *static_cast<const float*>(beta);
  const void* bias = description->epilogue == CUBLASLT_EPILOGUE_BIAS ? description->bias : nullptr;
  {
    const std::lock_guard lock(mutex);
    matmuls.push_back({left.rows(), right.columns(), left.columns(), stream, workspace,
                       static_cast<int>(algorithm->data[5])});
  }
  const auto all_of = [](const void* data, const FakeLayout& l) {
    return fake_cuda::Range{
        data, static_cast<std::size_t>(l.leading * l.columns) * (l.type == CUDA_R_16BF ? 2 : 4)};
  };
  const std::size_t bias_bytes =
      static_cast<std::size_t>(d_layout->rows) * (d_layout->type == CUDA_R_16BF ? 2 : 4);
  fake_cuda::touched(stream, "a product", {all_of(a, *a_layout), all_of(b, *b_layout), {bias, bias_bytes}},
                     {all_of(d, *d_layout), {workspace, 64}});
  fake_cuda::enqueue(stream, [=, layout = *d_layout] {
    multiply(left, right, layout, d, alpha_value, beta_value, bias);
    std::memset(workspace, 0xff, 64);  // as if it were used: two streams must not share one
  });
  return CUBLAS_STATUS_SUCCESS;
}

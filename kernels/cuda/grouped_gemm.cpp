// The products of experts as one cuBLASLt call each, side by side on several streams: an expert alone fills a
// GPU's multiprocessors for one wave and a half.

#include "kernels/ops/grouped_gemm.h"

#include <vector>

#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/choose/expert_products.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/library/cublaslt.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

void set_zero(const Exec& ex, const TensorView& t) {
  check(cudaMemsetAsync(t.data, 0, t.bytes(), stream_of(ex).raw()));
}

// A call of cuBLASLt takes its rows as numbers of the host.
std::vector<std::int64_t> offsets_on_host(Exec& ex, const ExpertRows& rows, std::int64_t total) {
  if (!rows.on_host.empty()) return {rows.on_host.begin(), rows.on_host.end()};
  std::vector<std::int32_t> fetched(static_cast<std::size_t>(rows.experts() + 1));
  download(ex, host_view(fetched.data(), rows.offset_e1.shape), rows.offset_e1);
  ops::check_offsets(std::span<const std::int32_t>(fetched), total);
  return {fetched.begin(), fetched.end()};
}

struct Expert {
  std::int64_t index, first, rows;
};

// product_of(expert) for each expert that has rows, in order.
template <class ProductOf>
void multiply_beside(const Exec& ex, const std::vector<std::int64_t>& offsets, const ProductOf& product_of) {
  auto& library = stream_of(ex).kept<GemmLibrary>();
  library.fork();
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
    const Expert expert{static_cast<std::int64_t>(e), offsets[e], offsets[e + 1] - offsets[e]};
    if (expert.rows > 0) library.multiply_beside(product_of(expert));
  }
  library.join();
}

// Whether cuBLASLt has work to do; what else was chosen is done here. No default: the compiler names the kernel that
// is chosen and not called.
bool left_to_cublaslt(const Exec& ex, ExpertsKernel kernel, const TensorView& out) {
  switch (kernel) {
    case ExpertsKernel::kNone:
      return false;
    case ExpertsKernel::kZeros:
      set_zero(ex, out);
      return false;
    case ExpertsKernel::kCublasLt:
      return true;
  }
  fail(ExitCode::kFailure, "products of experts: no such kernel");
}

// rows_of(out) = rows_of(in) op(w_i).
void multiply_rows(Exec& ex, ExpertsProduct product, const TensorView& out, const ConstTensorView& in,
                   const ConstTensorView& w_eNK, const ExpertRows& rows) {
  const ExpertsDescription d{.product = product,
                             .experts = w_eNK.shape[0],
                             .rows = in.shape[0],
                             .n = w_eNK.shape[1],
                             .k = w_eNK.shape[2],
                             .in = in.dtype,
                             .out = out.dtype};
  if (!left_to_cublaslt(ex, chosen(d, gpu_of(ex)), out)) return;
  multiply_beside(ex, offsets_on_host(ex, rows, d.rows), [&](const Expert& e) {
    return Product{.m = e.rows,
                   .n = out.shape[1],
                   .k = in.shape[1],
                   .transpose_b = product == ExpertsProduct::kForward ? Transpose::kYes : Transpose::kNo,
                   .in = in.dtype,
                   .out = out.dtype,
                   .a = in.rows(e.first, e.first + e.rows).data,
                   .b = w_eNK.rows(e.index, e.index + 1).data,
                   .c = out.rows(e.first, e.first + e.rows).data};
  });
}

}  // namespace

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          const ExpertRows& rows) {
  multiply_rows(ex, ExpertsProduct::kForward, y_RN, x_RK, w_eNK, rows);
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        const ExpertRows& rows) {
  multiply_rows(ex, ExpertsProduct::kInputGradient, dx_RK, dy_RN, w_eNK, rows);
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        const ExpertRows& rows, Accumulate mode) {
  const ExpertsDescription d{.product = ExpertsProduct::kWeightGradient,
                             .experts = dw_eNK.shape[0],
                             .rows = x_RK.shape[0],
                             .n = dw_eNK.shape[1],
                             .k = dw_eNK.shape[2],
                             .in = dy_RN.dtype,
                             .out = dw_eNK.dtype,
                             .mode = mode};
  if (!left_to_cublaslt(ex, chosen(d, gpu_of(ex)), dw_eNK)) return;
  const std::vector<std::int64_t> offsets = offsets_on_host(ex, rows, d.rows);
  // An expert without rows has no product, and its gradient is zero all the same.
  if (mode == Accumulate::kOverwrite)
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e)
      if (offsets[e] == offsets[e + 1])
        set_zero(ex, dw_eNK.rows(static_cast<std::int64_t>(e), static_cast<std::int64_t>(e) + 1));
  multiply_beside(ex, offsets, [&](const Expert& e) {
    return Product{.m = d.n,
                   .n = d.k,
                   .k = e.rows,
                   .transpose_a = Transpose::kYes,
                   .in = d.in,
                   .out = d.out,
                   .mode = mode,
                   .a = dy_RN.rows(e.first, e.first + e.rows).data,
                   .b = x_RK.rows(e.first, e.first + e.rows).data,
                   .c = dw_eNK.rows(e.index, e.index + 1).data};
  });
}

}  // namespace upmoe::cuda

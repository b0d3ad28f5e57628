// The products of experts as one cuBLASLt call each, side by side on several streams: an expert alone fills a
// GPU's multiprocessors for one wave and a half.

#include "kernels/ops/grouped_gemm.h"

#include "kernels/cuda/library/cublaslt.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

struct Expert {
  std::int64_t index, first, rows;
};

// body(expert) gives each expert's product, in order; those without rows are left out.
template <class Body>
void beside_each_other(const Exec& ex, std::span<const std::int64_t> offsets, const Body& body) {
  auto& library = stream_of(ex).kept<GemmLibrary>();
  library.fork();
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
    const Expert expert{static_cast<std::int64_t>(e), offsets[e], offsets[e + 1] - offsets[e]};
    if (expert.rows == 0) continue;
    const Product p = body(expert);
    if (p.m > 0 && p.n > 0 && p.k > 0) library.multiply_beside(p);
  }
  library.join();
}

template <class View>
auto row(const View& v, std::int64_t r) {
  return v.data + static_cast<std::size_t>(r) * (v.bytes() / static_cast<std::size_t>(v.rows()));
}

// rows_of(out) = rows_of(in) op(w_i).
void by_rows(const Exec& ex, const TensorView& out, const ConstTensorView& in, const ConstTensorView& w_eNK,
             Transpose transpose, std::span<const std::int64_t> offsets) {
  if (in.shape[1] == 0 && out.bytes() > 0)  // products over nothing
    check(cudaMemsetAsync(out.data, 0, out.bytes(), stream_of(ex).raw()));
  beside_each_other(ex, offsets, [&](const Expert& e) {
    Product p;
    p.m = e.rows;
    p.n = out.shape[1];
    p.k = in.shape[1];
    p.transpose_b = transpose;
    p.in = in.dtype;
    p.out = out.dtype;
    p.a = row(in, e.first);
    p.b = row(w_eNK, e.index);
    p.c = row(out, e.first);
    return p;
  });
}

}  // namespace

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          std::span<const std::int64_t> expert_offsets) {
  by_rows(ex, y_RN, x_RK, w_eNK, Transpose::kYes, expert_offsets);
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        std::span<const std::int64_t> expert_offsets) {
  by_rows(ex, dx_RK, dy_RN, w_eNK, Transpose::kNo, expert_offsets);
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        std::span<const std::int64_t> expert_offsets, Accumulate mode) {
  if (mode == Accumulate::kOverwrite)
    for (std::size_t e = 0; e + 1 < expert_offsets.size(); ++e) {
      if (expert_offsets[e] != expert_offsets[e + 1] || dw_eNK.bytes() == 0) continue;
      const std::size_t bytes = dw_eNK.bytes() / static_cast<std::size_t>(dw_eNK.rows());
      check(cudaMemsetAsync(dw_eNK.data + e * bytes, 0, bytes, stream_of(ex).raw()));
    }
  beside_each_other(ex, expert_offsets, [&](const Expert& e) {
    Product p;
    p.m = dw_eNK.shape[1];
    p.n = dw_eNK.shape[2];
    p.k = e.rows;
    p.transpose_a = Transpose::kYes;
    p.in = dy_RN.dtype;
    p.out = dw_eNK.dtype;
    p.mode = mode;
    p.a = row(dy_RN, e.first);
    p.b = row(x_RK, e.first);
    p.c = row(dw_eNK, e.index);
    return p;
  });
}

}  // namespace upmoe::cuda

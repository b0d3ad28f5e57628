// A dense product by each of the two that compute it (kernels/cpu/dense_product.h), which gemm.cpp chooses between: a
// layer's forward, its input's gradient and its weight's, of few rows and of many.
//   OMP_NUM_THREADS=2 build/release/bin/bench_ops --benchmark_filter=dense --benchmark_repetitions=5

#include "kernels/cpu/dense_product.h"
#include "kernels/ops/check_tensor.h"
#include "tests/bench/op_bench.h"

namespace upmoe::bench {

namespace {

struct Compute {
  const char* name;
  cpu::ComputeProduct product;
};
constexpr Compute kComputes[] = {{"onednn", cpu::multiply_by_onednn},
                                 {"packed", cpu::multiply_packed_blocks}};

struct Form {
  const char* name;
  std::int64_t rows, columns, depth;
  Transpose a, b;
};

Tensor factor(std::int64_t rows, std::int64_t columns, Transpose transpose, DType dtype) {
  return transpose == Transpose::kYes ? Tensor({columns, rows}, dtype) : Tensor({rows, columns}, dtype);
}

void add_product(const Compute& compute, const Form& f, DType dtype) {
  add(fmt::format("dense_{}/{}/{}x{}x{}", compute.name, f.name, f.rows, f.depth, f.columns), dtype,
      [=](benchmark::State& state) {
        const Tensor a = factor(f.rows, f.depth, f.a, dtype), b = factor(f.depth, f.columns, f.b, dtype);
        const Tensor c({f.rows, f.columns}, dtype);
        const double flops = 2.0 * static_cast<double>(f.rows * f.columns * f.depth);
        measure(state, dtype, [&](Exec& ex) {
          // As ops::gemm books it, which chooses one of the two.
          ex.book("gemm", flops, ops::bytes_of(a.view) + ops::bytes_of(b.view), ops::bytes_of(c.view));
          compute.product(ex, {c.view, {a.view, f.a}, {b.view, f.b}, Accumulate::kOverwrite, {}});
        });
      });
}

}  // namespace

void add_dense() {
  for (const DType dtype : kFloats)
    for (const auto& [width, neurons] : {std::pair<std::int64_t, std::int64_t>{256, 2048}, {2048, 5632}})
      for (const std::int64_t rows : {16, 128, 512, 2048})
        for (const Form& f : {Form{"forward", rows, neurons, width, Transpose::kNo, Transpose::kYes},
                              Form{"dgrad", rows, width, neurons, Transpose::kNo, Transpose::kNo},
                              Form{"wgrad_up", neurons, width, rows, Transpose::kYes, Transpose::kNo},
                              Form{"wgrad_down", width, neurons, rows, Transpose::kYes, Transpose::kNo}})
          for (const Compute& compute : kComputes)
            if (compute.product != cpu::multiply_by_onednn || cpu::onednn_computes(dtype, dtype))
              add_product(compute, f, dtype);
}

}  // namespace upmoe::bench

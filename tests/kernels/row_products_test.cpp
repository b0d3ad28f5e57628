// Products row by row: what they are, and that a row knows nothing of the others.

#include <gtest/gtest.h>

#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct Types {
  DType in, out;
};
class RowProducts : public testing::TestWithParam<Types> {
 protected:
  RowProducts() { static_cast<Exec&>(ex_).row_by_row = true; }
  HostTensor product(const HostTensor& x, const HostTensor& w, ConstTensorView bias_N, std::int64_t rows,
                     std::int64_t columns) {
    HostTensor y = filled({rows, columns}, GetParam().out, NAN);
    ops::gemm(ex_, y, {x}, {w, Transpose::kYes}, Accumulate::kOverwrite, bias_N);
    return y;
  }
  OpExec ex_;
};

HostTensor rows_of(const HostTensor& all, std::int64_t begin, std::int64_t end, std::int64_t width,
                   DType dtype) {
  HostTensor part({end - begin, width}, dtype);
  for (std::int64_t i = begin * width; i < end * width; ++i) part.set(at(i - begin * width), all.get(at(i)));
  return part;
}

TEST_P(RowProducts, AreRightAndTheSameAlone) {
  const auto [in, out] = GetParam();
  const Tolerance tolerance = out == DType::kBF16 ? Tolerance{1.0 / 250, 3e-5} : Tolerance{1e-5, 3e-5};
  for (const std::int64_t K : {1, 15, 16, 40, 257})
    for (const std::int64_t N : {1, 3, 4, 67, 130})
      for (const std::int64_t M : {1, 2, 3, 4, 9})
        for (const bool biased : {false, true}) {
          const HostTensor x = random_tensor({M, K}, in, 1), w = random_tensor({N, K}, in, 2),
                           bias = random_tensor({N}, in, 3);
          const ConstTensorView bias_N = biased ? ConstTensorView(bias) : ConstTensorView{};
          const HostTensor y = product(x, w, bias_N, M, N);
          std::vector<double> expected;
          for (std::int64_t m = 0; m < M; ++m)
            for (std::int64_t n = 0; n < N; ++n) {
              double sum = biased ? bias.get(at(n)) : 0;
              for (std::int64_t k = 0; k < K; ++k) sum += x.get(at(m * K + k)) * w.get(at(n * K + k));
              expected.push_back(sum);
            }
          expect_close(y.values(), expected, tolerance, fmt::format("{} x {} x {}", M, N, K));
          for (std::int64_t m = 0; m < M; ++m)
            EXPECT_TRUE(product(rows_of(x, m, m + 1, K, in), w, bias_N, 1, N) == rows_of(y, m, m + 1, N, out))
                << "row " << m << " of " << M << ", " << N << " x " << K;
        }
}

// The rows of each expert are what a product with its weight alone gives.
TEST_P(RowProducts, OfExperts) {
  const auto [in, out] = GetParam();
  const std::int64_t N = 70, K = 40;
  const std::vector<std::int64_t> counts{0, 1, 5, 0, 2, 0};
  const Offsets offsets = offsets_of(counts);
  const HostTensor x = random_tensor({8, K}, in, 1), w = random_tensor({6, N, K}, in, 2);
  HostTensor y = filled({8, N}, out, NAN);
  ops::grouped_gemm_forward(ex_, y, x, w, offsets);
  const HostTensor weights = rows_of(w, 0, 6 * N, K, in);
  std::int64_t begin = 0;
  for (std::size_t e = 0; e < counts.size(); ++e) {
    const std::int64_t end = begin + counts[e], first = static_cast<std::int64_t>(e) * N;
    EXPECT_TRUE(product(rows_of(x, begin, end, K, in), rows_of(weights, first, first + N, K, in), {},
                        counts[e], N) == rows_of(y, begin, end, N, out))
        << "expert " << e;
    begin = end;
  }
  HostTensor none({0, N}, out);
  ops::grouped_gemm_forward(ex_, none, HostTensor({0, K}, in), w, offsets_of({0, 0, 0, 0, 0, 0}));
}

TEST_P(RowProducts, SameBitsForAnyThreads) {
  const HostTensor x = random_tensor({5, 300}, GetParam().in, 1),
                   w = random_tensor({200, 300}, GetParam().in, 2);
  expect_same_for_any_threads([&] { return product(x, w, {}, 5, 200); });
}

INSTANTIATE_TEST_SUITE_P(Types, RowProducts,
                         testing::Values(Types{DType::kF32, DType::kF32}, Types{DType::kBF16, DType::kBF16},
                                         Types{DType::kBF16, DType::kF32}),
                         [](const auto& i) {
                           return dtype_label(i.param.in) + "_to_" + dtype_label(i.param.out);
                         });

}  // namespace
}  // namespace upmoe::test

// How cuBLASLt is called, through the pretended one that records: results are in gemm_test and grouped_gemm_test.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "kernels/core/product_algorithms.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

TEST(CublasLt, RowMajorProductsAreTransposedOnes) {
  OpExec ex;
  const HostTensor x = random_tensor({3, 5}, DType::kBF16, 1), w = random_tensor({7, 5}, DType::kBF16, 2);
  HostTensor y({3, 7}, DType::kF32);
  fake_cuda::take_matmuls();
  ops::gemm(ex, y, {x}, {w, Transpose::kYes}, Accumulate::kOverwrite);
  finish_ops();
  const auto calls = fake_cuda::take_matmuls();
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0].m, 7);  // columns of ours
  EXPECT_EQ(calls[0].n, 3);
  EXPECT_EQ(calls[0].k, 5);
}

TEST(CublasLt, ChoosesAnAlgorithmOncePerShape) {
  OpExec ex;
  const HostTensor x = random_tensor({24, 40}, DType::kBF16, 1), w = random_tensor({56, 40}, DType::kBF16, 2);
  HostTensor y({24, 56}, DType::kBF16), z({24, 56}, DType::kF32);
  const int before = fake_cuda::heuristic_calls();
  for (int i = 0; i < 5; ++i) {
    ops::gemm(ex, y, {x}, {w, Transpose::kYes}, Accumulate::kOverwrite);
    ops::gemm(ex, z, {x}, {w, Transpose::kYes}, Accumulate::kOverwrite);
    ops::gemm(ex, z, {x}, {w, Transpose::kYes}, Accumulate::kAdd);
  }
  finish_ops();
  EXPECT_EQ(fake_cuda::heuristic_calls() - before, 3);
}

TEST(CublasLt, ExpertsRunSideBySideWithWorkspacesOfTheirOwn) {
  OpExec ex;
  const Offsets offsets{0, 2, 2, 7, 8, 12, 12, 20, 21, 30, 33};  // two experts without rows
  const std::int64_t experts = 10;
  const HostTensor x = random_tensor({33, 8}, DType::kF32, 1),
                   w = random_tensor({experts, 6, 8}, DType::kF32, 2);
  HostTensor y({33, 6}, DType::kF32);
  fake_cuda::take_matmuls();
  ops::grouped_gemm_forward(ex, y, x, w, offsets);
  finish_ops();
  const auto calls = fake_cuda::take_matmuls();
  ASSERT_EQ(calls.size(), 8u);
  std::map<const void*, std::set<const void*>> workspaces_of_stream, streams_of_workspace;
  for (const auto& call : calls) {
    workspaces_of_stream[call.stream].insert(call.workspace);
    streams_of_workspace[call.workspace].insert(call.stream);
  }
  EXPECT_GE(workspaces_of_stream.size(), 4u) << "streams";
  EXPECT_LE(workspaces_of_stream.size(), 8u);
  for (const auto& [workspace, streams] : streams_of_workspace) EXPECT_EQ(streams.size(), 1u);
}

// Routing gives every expert other numbers of rows at every step.
TEST(CublasLt, ChoosesNothingNewForOtherNumbersOfRows) {
  OpExec ex;
  const std::int64_t k = 8, n = 6;  // rows of 16 and 12 bytes: where they begin is aligned in all ways
  const HostTensor x = random_tensor({700, k}, DType::kBF16, 1),
                   w = random_tensor({3, n, k}, DType::kBF16, 2),
                   dy = random_tensor({700, n}, DType::kBF16, 3);
  const auto run = [&](std::int64_t first, std::int64_t second) {
    const Offsets offsets{0, first, first + second, 700};
    HostTensor y({700, n}, DType::kBF16), dx({700, k}, DType::kBF16), dw({3, n, k}, DType::kBF16);
    ops::grouped_gemm_forward(ex, y, x, w, offsets);
    ops::grouped_gemm_dgrad(ex, dx, dy, w, offsets);
    ops::grouped_gemm_wgrad(ex, dw, dy, x, offsets, Accumulate::kOverwrite);
    finish_ops();
  };
  run(129, 270);  // and 301: chosen for 256, 512, 512
  const int before = fake_cuda::heuristic_calls();
  run(161, 304);
  run(255, 257);
  EXPECT_EQ(fake_cuda::heuristic_calls(), before);
}

TEST(CublasLt, AnAlgorithmThatRefusesTheRowsIsReplacedByOneForThem) {
  OpExec ex;
  const Offsets offsets{0, 5, 12};
  const HostTensor x = random_tensor({12, 8}, DType::kF32, 1), w = random_tensor({2, 6, 8}, DType::kF32, 2);
  HostTensor y({12, 6}, DType::kF32), again({12, 6}, DType::kF32);
  ops::grouped_gemm_forward(ex, y, x, w, offsets);
  finish_ops();
  fake_cuda::fail_next("cublasLtMatmul", 1);
  const int before = fake_cuda::heuristic_calls();
  ops::grouped_gemm_forward(ex, again, x, w, offsets);
  finish_ops();
  EXPECT_EQ(fake_cuda::heuristic_calls() - before, 1);
  EXPECT_EQ(y.values(), again.values());
}

// Of the pretended GPU, for x [24, 40] w [56, 40]^T.
ProductAlgorithms table_of(int place, const ProductLibrary& library = {"pretended GPU", 130100}) {
  const ProductShape shape{
      .m = 24, .n = 56, .k = 40, .transpose_b = true, .in = DType::kBF16, .out = DType::kBF16};
  return {{{library, {{shape, place}}}}};
}

class CublasLtTable : public testing::Test {
 protected:
  OpExec ex;
  Buffer memory = Buffer::allocate(static_cast<Exec&>(ex).device, 3 * 8192);

  // The algorithm of one product whose tensors begin `shift` bytes behind a multiple of 256.
  int algorithm_of(const ProductAlgorithms& table, std::int64_t m = 24, std::size_t shift = 0) {
    const auto view = [&](std::size_t i, Shape shape) {
      TensorView t = memory.view({3 * 4096}, DType::kBF16);
      t.data += i * 8192 + shift;
      t.shape = shape;
      return t;
    };
    static_cast<Exec&>(ex).algorithms = &table;
    finish_ops();
    fake_cuda::take_matmuls();
    ops::gemm(ex, view(0, {m, 56}), {view(1, {m, 40})}, {view(2, {56, 40}), Transpose::kYes},
              Accumulate::kOverwrite);
    finish_ops();
    const auto calls = fake_cuda::take_matmuls();
    return calls.size() == 1 ? calls[0].algorithm : -1;
  }
};

TEST_F(CublasLtTable, NamesTheAlgorithmOfAShape) {
  EXPECT_EQ(algorithm_of({}), 0) << "an empty table: the library's first";
  EXPECT_EQ(algorithm_of(table_of(3)), 3);
  EXPECT_EQ(algorithm_of(table_of(1)), 1) << "another table is another plan";
  EXPECT_EQ(algorithm_of(table_of(0)), 0);
  EXPECT_EQ(algorithm_of(table_of(3), 23), 0) << "another shape";
  EXPECT_EQ(algorithm_of(table_of(3), 24, 16), 0) << "other addresses";
  EXPECT_EQ(algorithm_of(table_of(3, {"NVIDIA H200", 130100})), 0) << "another device";
  EXPECT_EQ(algorithm_of(table_of(3, {"pretended GPU", 130200})), 0) << "another version";
}

TEST_F(CublasLtTable, ThatNamesWhatIsNotOfferedIsAnError) {
  try {
    algorithm_of(table_of(5));  // the pretended library has four
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kDevice);
    EXPECT_THAT(e.what(),
                testing::HasSubstr("names number 5 for a product of 24 x 56 x 40, bf16 to bf16, on pretended "
                                   "GPU; cuBLASLt 130100 offers 4 there: take its line out"));
  }
}

TEST(CublasLt, NoAlgorithmIsAnErrorWithTheShape) {
  OpExec ex;
  const HostTensor x = random_tensor({31, 9}, DType::kF32, 1), w = random_tensor({11, 9}, DType::kF32, 2);
  HostTensor y({31, 11}, DType::kF32);
  fake_cuda::fail_next("cublasLtMatmulAlgoGetHeuristic", 1);
  try {
    ops::gemm(ex, y, {x}, {w, Transpose::kYes}, Accumulate::kOverwrite);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kDevice);
    EXPECT_THAT(e.what(), testing::HasSubstr("31 x 11 x 9, fp32 to fp32"));
  }
}

}  // namespace
}  // namespace upmoe::test

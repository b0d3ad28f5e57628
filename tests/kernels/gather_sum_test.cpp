// gather_sum_rows alone: the sum of a token's rows, and what it is added to in the same pass.

#include <gtest/gtest.h>

#include "kernels/ops/activation.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

class GatherSum : public testing::TestWithParam<std::pair<DType, DType>> {};

TEST_P(GatherSum, SumsInOrder) {
  const auto [y_dtype, dtype] = GetParam();
  for (auto [T, K, D] : {std::tuple{5, 3, 14}, {40, 4, 64}, {2, 1, 1}, {0, 4, 8}}) {
    OpExec ex;
    const HostTensor rows = random_tensor({T * K, D}, dtype, 1);
    HostTensor slot({T, K}, DType::kI32);
    for (std::size_t i = 0; i < slot.size(); ++i) slot.set(i, static_cast<double>((i * 7 + 3) % slot.size()));
    Values expected(static_cast<std::size_t>(T * D));
    for (std::size_t i = 0; i < expected.size(); ++i)
      for (std::size_t j = 0; j < static_cast<std::size_t>(K); ++j) {
        const auto d = static_cast<std::size_t>(D), k = static_cast<std::size_t>(K);
        expected[i] += rows.get(static_cast<std::size_t>(slot.get(i / d * k + j)) * d + i % d);
      }
    HostTensor y = filled({T, D}, y_dtype, 1.5);
    ops::gather_sum_rows(ex, y, rows, slot);
    expect_close(y.values(), expected, rounding_of(y_dtype), "y");
    HostTensor added = filled({T, D}, y_dtype, 1.5);
    ops::gather_sum_rows(ex, added, rows, slot, {.base_TD = added});
    expect_close(added.values(), sum_of(expected, Values(expected.size(), 1.5)), rounding_of(y_dtype),
                 "y adds");
  }
}
INSTANTIATE_TEST_SUITE_P(DTypes, GatherSum,
                         testing::Values(std::pair{DType::kF32, DType::kF32},
                                         std::pair{DType::kF32, DType::kBF16},
                                         std::pair{DType::kBF16, DType::kBF16}),
                         [](const auto& i) {
                           return dtype_label(i.param.first) + "_" + dtype_label(i.param.second);
                         });

// One pass against one after the other, to the bit, and against double: forward's (a shared expert's output and the
// residual) and backward's (the shared expert's gradient with its gate's share).
class SumOntoTest : public testing::TestWithParam<std::tuple<std::pair<DType, DType>, Shape>> {
 protected:
  const DType y_dtype = std::get<0>(GetParam()).first, dtype = std::get<0>(GetParam()).second;
  const std::int64_t T = std::get<1>(GetParam())[0], K = std::get<1>(GetParam())[1],
                     D = std::get<1>(GetParam())[2];
  const HostTensor rows{random_tensor({T * K, D}, dtype, 1)}, base{random_tensor({T, D}, y_dtype, 2)},
      residual{random_tensor({T, D}, y_dtype, 3)}, w{random_tensor({1, D}, dtype, 4)},
      x{random_tensor({T, D}, dtype, 5)}, dgate{random_tensor({T}, DType::kF32, 6)};
  HostTensor slot{{T, K}, DType::kI32}, gate{{T}, DType::kF32}, y{{T, D}, y_dtype};
  OpExec ex;

  void SetUp() override {
    for (std::size_t i = 0; i < slot.size(); ++i)
      slot.set(i, i % 5 == 3 ? -1.0 : static_cast<double>((i * 7 + 3) % slot.size()));
    ops::sigmoid_gate_forward(ex, gate, x, w);
  }
  double sum_at(std::size_t i) const {
    const auto d = static_cast<std::size_t>(D), k = static_cast<std::size_t>(K);
    double sum = 0;
    for (std::size_t j = 0; j < k; ++j)
      if (const double row = slot.get(i / d * k + j); row >= 0)
        sum += rows.get(static_cast<std::size_t>(row) * d + i % d);
    return sum;
  }
  // bf16 rounds every sum; numbers reach 8.
  Tolerance tolerance() const {
    return y_dtype == DType::kBF16 ? Tolerance{1.0 / 64, 0.04} : Tolerance{1e-5, 1e-5};
  }
};

TEST_P(SumOntoTest, BaseAndResidual) {
  ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = base, .residual_TD = residual});
  HostTensor apart = base, alone({T, D}, y_dtype), in_place = base;
  ops::gather_sum_rows(ex, apart, rows, slot, {.base_TD = apart});
  ops::add(ex, apart, residual, apart);
  EXPECT_TRUE(y == apart) << "the passes one after the other";
  ops::gather_sum_rows(ex, in_place, rows, slot, {.base_TD = in_place, .residual_TD = residual});
  EXPECT_TRUE(y == in_place) << "the base may be the result";
  HostTensor onto_residual = residual;
  ops::gather_sum_rows(ex, onto_residual, rows, slot, {.base_TD = base, .residual_TD = onto_residual});
  EXPECT_TRUE(y == onto_residual) << "and so may the residual";
  Values expected(y.size());
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = sum_at(i) + base.get(i) + residual.get(i);
  expect_close(y.values(), expected, tolerance(), "y");
  // A mixture without a shared expert.
  ops::gather_sum_rows(ex, alone, rows, slot, {.residual_TD = residual});
  HostTensor zeros = filled({T, D}, y_dtype, 0);
  ops::gather_sum_rows(ex, zeros, rows, slot, {.base_TD = zeros});
  ops::add(ex, zeros, residual, zeros);
  EXPECT_TRUE(alone == zeros) << "no base is a base of zeros";
}

TEST_P(SumOntoTest, BaseAndGate) {
  const ConstTensorView dgate_T = dgate, gate_T = gate, w_1D = w;
  HostTensor dw = filled({1, D}, DType::kF32, 0.25), dw_alone = dw, apart = base;
  ops::sigmoid_gate_backward(ex, {}, dw_alone, dgate, gate, x, w);
  ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = base, .gate = {dgate_T, gate_T, w_1D}});
  ops::sigmoid_gate_backward(ex, apart, dw, dgate, gate, x, w);
  ops::gather_sum_rows(ex, apart, rows, slot, {.base_TD = apart});
  EXPECT_TRUE(y == apart) << "the passes one after the other";
  EXPECT_TRUE(dw == dw_alone) << "the weight's gradient knows nothing of it";
  Values expected(y.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::size_t t = i / static_cast<std::size_t>(D);
    const double g = gate.get(t);
    expected[i] =
        sum_at(i) + base.get(i) + dgate.get(t) * g * (1 - g) * w.get(i % static_cast<std::size_t>(D));
  }
  expect_close(y.values(), expected, tolerance(), "dx");
}

std::string label(const testing::TestParamInfo<SumOntoTest::ParamType>& i) {
  const auto& [dtypes, shape] = i.param;
  return fmt::format("{}_{}_{}x{}x{}", dtype_label(dtypes.first), dtype_label(dtypes.second), shape[0],
                     shape[1], shape[2]);
}
INSTANTIATE_TEST_SUITE_P(Shapes, SumOntoTest,
                         testing::Combine(testing::Values(std::pair{DType::kF32, DType::kF32},
                                                          std::pair{DType::kF32, DType::kBF16},
                                                          std::pair{DType::kBF16, DType::kBF16}),
                                          testing::Values(Shape{5, 3, 14}, Shape{40, 4, 64}, Shape{2, 1, 1},
                                                          Shape{0, 4, 8}, Shape{3, 6, 2048},
                                                          Shape{7, 5, 130})),
                         label);

TEST(SumOntoChecks, RefusesWrongTensors) {
  OpExec ex;
  HostTensor y({4, 8}, DType::kF32), rows({8, 8}, DType::kF32),
      slot = filled({4, 2}, DType::kI32, 0), narrow({4, 7}, DType::kF32), half({4, 8}, DType::kBF16),
      of_tokens({4}, DType::kF32), w({1, 8}, DType::kF32);
  const ConstTensorView dgate_T = of_tokens, w_1D = w, short_w = narrow;
  EXPECT_NO_THROW(ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = y, .gate = {dgate_T, dgate_T, w_1D}}));
  EXPECT_THROW(ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = narrow}), Error);
  EXPECT_THROW(ops::gather_sum_rows(ex, y, rows, slot, {.residual_TD = half}), Error)
      << "of the result's dtype";
  EXPECT_THROW(ops::gather_sum_rows(ex, y, rows, slot, {.gate = {dgate_T, dgate_T, w_1D}}), Error)
      << "no base";
  EXPECT_THROW(ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = y, .gate = {dgate_T, dgate_T, short_w}}),
               Error);
}

TEST(SumOntoDry, BooksTheGatesWorkWithTheGate) {
  OpExec ex(DeviceType::kDry);
  const TensorView y = dry_tensor({8, 10}, DType::kBF16), rows = dry_tensor({16, 10}, DType::kBF16),
                   slot = dry_tensor({8, 2}, DType::kI32), of_tokens = dry_tensor({8}, DType::kF32),
                   w = dry_tensor({1, 10}, DType::kBF16), dw = dry_tensor({1, 10}, DType::kF32);
  ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = y, .residual_TD = y});
  expect_booked(ex.ledger(), "gather_sum_rows", 160 + 2 * 80, 320 + 64 + 2 * 160, 160);
  ops::sigmoid_gate_backward(ex, {}, dw, of_tokens, of_tokens, y, w);
  expect_booked(ex.ledger(), "sigmoid_gate_backward", 2 * 80, 160 + 2 * 32 + 40, 40);
  const double before = ex.ledger().total().model_flops;
  ops::gather_sum_rows(ex, y, rows, slot, {.base_TD = y, .gate = {of_tokens, of_tokens, w}});
  EXPECT_EQ(ex.ledger().total().model_flops - before, 2 * 80) << "with the other half that of the whole op";
}

}  // namespace
}  // namespace upmoe::test

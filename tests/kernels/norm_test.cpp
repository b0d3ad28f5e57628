#include "kernels/ops/norm.h"

#include <gtest/gtest.h>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

constexpr float kEps = 1e-6f;

struct Case {
  std::int64_t rows, width;
  DType dtype;
};

class Norm : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().rows, D = GetParam().width;
  const DType dtype = GetParam().dtype;
  // bf16: the normalised value and the result are both rounded.
  const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 100, 2e-3} : Tolerance{1e-5, 2e-6};
  HostTensor x{random_tensor({T, D}, dtype, 1, 2.0, 0.3)}, w{random_tensor({D}, dtype, 2, 0.5, 1.0)};
  HostTensor dy{random_tensor({T, D}, dtype, 3)}, y{{T, D}, dtype}, rstd{{T}, DType::kF32};
  OpExec ex;
};

TEST_P(Norm, Forward) {
  ops::rms_norm_forward(ex, y, rstd, x, {w, kEps});
  Values expected_rstd;
  expect_close(y.values(), reference_rms_norm(x.values(), w.values(), kEps, &expected_rstd), tolerance, "y");
  expect_close(rstd.values(), expected_rstd, {1e-6, 0}, "rstd");
}

TEST_P(Norm, AddForward) {
  const HostTensor residual = random_tensor({T, D}, dtype, 4);
  HostTensor sum({T, D}, dtype);
  ops::add_rms_norm_forward(ex, y, sum, rstd, x, residual, {w, kEps});
  expect_close(sum.values(), sum_of(x.values(), residual.values()), rounding_of(dtype), "sum");
  expect_close(y.values(), reference_rms_norm(sum.values(), w.values(), kEps), tolerance, "y");
  HostTensor aliased = x, y2 = y;
  ops::add_rms_norm_forward(ex, y2, aliased, rstd, aliased, residual, {w, kEps});
  EXPECT_TRUE(aliased == sum && y2 == y) << "sum may alias x";
}

TEST_P(Norm, Backward) {
  const Values wv = w.values(), dyv = dy.values();
  const Values dx_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_rms_norm(v, wv, kEps), dyv); }, x.values());
  const Values dw_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_rms_norm(x.values(), v, kEps), dyv); }, wv);
  ops::rms_norm_forward(ex, y, rstd, x, {w, kEps});
  HostTensor dx({T, D}, dtype), dw = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, dx, dw, dy, {x, rstd}, w, Accumulate::kOverwrite);
  expect_close(dx.values(), dx_expected, tolerance, "dx");
  expect_close(dw.values(), sum_of(dw_expected, Values(wv.size(), 0.25)), tolerance, "dw adds");

  HostTensor added = filled({T, D}, dtype, 0.5), dw2 = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, added, dw2, dy, {x, rstd}, w, Accumulate::kAdd);
  expect_close(added.values(), sum_of(dx_expected, Values(added.size(), 0.5)), tolerance, "dx adds");
  HostTensor aliased = dy, dw3 = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, aliased, dw3, aliased, {x, rstd}, w, Accumulate::kOverwrite);
  EXPECT_TRUE(aliased == dx && dw3 == dw) << "dx may alias dy";
  EXPECT_EQ(ex.scratch_used(), 0u);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (auto [rows, width] : {std::pair{1, 3},
                               {3, 14},
                               {33, 16},
                               {5, 83},
                               {70, 28},
                               {2, 256},
                               {0, 32},
                               {1030, 8},
                               {3, 1032},
                               {1, 2064},
                               {2, 1031}})
      all.push_back({rows, width, dtype});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, Norm, testing::ValuesIn(cases()), [](const auto& i) {
  return dtype_label(i.param.dtype) + "_" + std::to_string(i.param.rows) + "x" +
         std::to_string(i.param.width);
});

TEST(NormThreads, SameBits) {
  const std::int64_t T = 301, D = 200;
  expect_same_for_any_threads([&] {
    OpExec ex;
    const HostTensor x = random_tensor({T, D}, DType::kF32, 1), w = random_tensor({D}, DType::kF32, 2);
    const HostTensor dy = random_tensor({T, D}, DType::kF32, 3);
    HostTensor y({T, D}, DType::kF32), rstd({T}, DType::kF32), dx({T, D}, DType::kF32), dw({D}, DType::kF32);
    ops::rms_norm_forward(ex, y, rstd, x, {w, kEps});
    ops::rms_norm_backward(ex, dx, dw, dy, {x, rstd}, w, Accumulate::kOverwrite);
    return std::tuple(y, rstd, dx, dw);
  });
}

TEST(NormChecks, RefusesWrongTensors) {
  OpExec ex;
  HostTensor x = filled({4, 8}, DType::kF32, 1), w = filled({8}, DType::kF32, 1), y({4, 8}, DType::kF32);
  HostTensor rstd({4}, DType::kF32), short_w = filled({7}, DType::kF32, 1), bf16_y({4, 8}, DType::kBF16);
  EXPECT_THROW(ops::rms_norm_forward(ex, y, rstd, x, {short_w, kEps}), Error);
  EXPECT_THROW(ops::rms_norm_forward(ex, bf16_y, rstd, x, {w, kEps}), Error);
  EXPECT_THROW(ops::rms_norm_forward(ex, y, w, x, {w, kEps}), Error);
  EXPECT_THROW(ops::rms_norm_forward(ex, dry_tensor({4, 8}, DType::kF32), rstd, x, {w, kEps}), Error);
}

TEST(NormDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView x = dry_tensor({6, 8}, DType::kBF16), w = dry_tensor({8}, DType::kBF16);
  const TensorView rstd = dry_tensor({6}, DType::kF32), dw = dry_tensor({8}, DType::kF32);
  ops::rms_norm_forward(ex, x, rstd, x, {w, kEps});
  ops::rms_norm_backward(ex, x, dw, x, {x, rstd}, w, Accumulate::kAdd);
  expect_booked(ex.ledger(), "rms_norm_forward", 4 * 48, 96 + 16, 96 + 24);
  expect_booked(ex.ledger(), "rms_norm_backward", 11 * 48, 3 * 96 + 16 + 24 + 32, 96 + 32);
}

}  // namespace
}  // namespace upmoe::test

#include "kernels/ops/layer_norm.h"

#include <gtest/gtest.h>

#include "tests/support/norm_shapes.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

constexpr float kEps = 1e-5f;

struct Case {
  std::int64_t rows, width;
  DType dtype;
};

class LayerNorm : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().rows, D = GetParam().width;
  const DType dtype = GetParam().dtype;
  const Tolerance of_y = dtype == DType::kBF16 ? Tolerance{1.0 / 256, 1e-6} : Tolerance{1e-5, 2e-6};
  const Tolerance of_gradients = dtype == DType::kBF16 ? Tolerance{1.0 / 100, 2e-3} : Tolerance{1e-5, 5e-6};
  // A mean that is far from 0, which a norm that did not take it away would show.
  HostTensor x{random_tensor({T, D}, dtype, 1, 2.0, 1.5)}, w{random_tensor({D}, dtype, 2, 0.5, 1.0)},
      dy{random_tensor({T, D}, dtype, 3)}, y{{T, D}, dtype}, mean{{T}, DType::kF32}, rstd{{T}, DType::kF32};
  OpExec ex;

  void forward() {
    const TensorView mean_T = mean, rstd_T = rstd;
    ops::layer_norm_forward(ex, y, {mean_T, rstd_T}, x, w, kEps);
  }
};

TEST_P(LayerNorm, Forward) {
  forward();
  ReferenceMoments expected;
  expect_close(y.values(), reference_layer_norm(x.values(), w.values(), kEps, &expected), of_y, "y");
  expect_close(mean.values(), expected.mean, {1e-6, 1e-6}, "mean");
  expect_close(rstd.values(), expected.rstd, {1e-5, 0}, "rstd");
}

TEST_P(LayerNorm, Backward) {
  const Values wv = w.values(), dyv = dy.values();
  const Values dx_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_layer_norm(v, wv, kEps), dyv); }, x.values());
  const Values dw_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_layer_norm(x.values(), v, kEps), dyv); }, wv);
  forward();
  HostTensor dx({T, D}, dtype), dw = filled({D}, DType::kF32, 0.25);
  ops::layer_norm_backward(ex, dx, dw, dy, {x, mean, rstd}, w, Accumulate::kOverwrite);
  expect_close(dx.values(), dx_expected, of_gradients, "dx");
  expect_close(dw.values(), sum_of(dw_expected, Values(wv.size(), 0.25)), of_gradients, "dw adds");

  HostTensor added = filled({T, D}, dtype, 0.5), dw2 = filled({D}, DType::kF32, 0.25);
  ops::layer_norm_backward(ex, added, dw2, dy, {x, mean, rstd}, w, Accumulate::kAdd);
  expect_close(added.values(), sum_of(dx_expected, Values(added.size(), 0.5)), of_gradients, "dx adds");
  EXPECT_TRUE(dw2 == dw) << "whatever dx does";
  HostTensor aliased = dy, dw3 = filled({D}, DType::kF32, 0.25);
  ops::layer_norm_backward(ex, aliased, dw3, aliased, {x, mean, rstd}, w, Accumulate::kOverwrite);
  EXPECT_TRUE(aliased == dx && dw3 == dw) << "dx may alias dy";
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST_P(LayerNorm, BackwardOverwritesTheWeightsGradient) {
  forward();
  for (const DType type : {DType::kF32, dtype})
    expect_overwrites({D}, type, [&](const GradientView& dw) {
      HostTensor dx({T, D}, dtype);
      ops::layer_norm_backward(ex, dx, dw, dy, {x, mean, rstd}, w, Accumulate::kOverwrite);
    });
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (const auto& [rows, width] : test::kNormShapes) all.push_back({rows, width, dtype});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, LayerNorm, testing::ValuesIn(cases()), [](const auto& i) {
  return fmt::format("{}_{}x{}", dtype_label(i.param.dtype), i.param.rows, i.param.width);
});

TEST(LayerNormThreads, SameBits) {
  const std::int64_t T = 301, D = 200;
  const HostTensor x = random_tensor({T, D}, DType::kF32, 1), w = random_tensor({D}, DType::kF32, 2),
                   dy = random_tensor({T, D}, DType::kF32, 3);
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor y({T, D}, DType::kF32), mean({T}, DType::kF32), rstd({T}, DType::kF32),
        dx({T, D}, DType::kF32), dw({D}, DType::kF32);
    const TensorView mean_T = mean, rstd_T = rstd;
    ops::layer_norm_forward(ex, y, {mean_T, rstd_T}, x, w, kEps);
    ops::layer_norm_backward(ex, dx, dw, dy, {x, mean, rstd}, w, Accumulate::kOverwrite);
    return std::tuple(y, mean, rstd, dx, dw);
  });
}

TEST(LayerNormChecks, RefusesWrongTensors) {
  OpExec ex;
  HostTensor x = filled({4, 8}, DType::kF32, 1), w = filled({8}, DType::kF32, 1), y({4, 8}, DType::kF32);
  HostTensor of_rows({4}, DType::kF32), short_w = filled({7}, DType::kF32, 1), bf16_y({4, 8}, DType::kBF16);
  const TensorView stat = of_rows, wrong = w;
  EXPECT_THROW(ops::layer_norm_forward(ex, y, {stat, stat}, x, short_w, kEps), Error);
  EXPECT_THROW(ops::layer_norm_forward(ex, bf16_y, {stat, stat}, x, w, kEps), Error);
  EXPECT_THROW(ops::layer_norm_forward(ex, y, {wrong, stat}, x, w, kEps), Error);
  EXPECT_THROW(ops::layer_norm_forward(ex, y, {stat, wrong}, x, w, kEps), Error);
}

TEST(LayerNormDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView x = dry_tensor({6, 8}, DType::kBF16), w = dry_tensor({8}, DType::kBF16);
  const TensorView stat = dry_tensor({6}, DType::kF32), dw = dry_tensor({8}, DType::kF32);
  ops::layer_norm_forward(ex, x, {stat, stat}, x, w, kEps);
  ops::layer_norm_backward(ex, x, dw, x, {x, stat, stat}, w, Accumulate::kAdd);
  expect_booked(ex.ledger(), "layer_norm_forward", 6 * 48, 96 + 16, 96 + 2 * 24);
  expect_booked(ex.ledger(), "layer_norm_backward", 14 * 48, 3 * 96 + 16 + 2 * 24 + 32, 96 + 32);
}

}  // namespace
}  // namespace upmoe::test

#include "kernels/ops/norm.h"

#include <gtest/gtest.h>

#include "kernels/ops/pointwise.h"
#include "tests/support/norm_shapes.h"
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
  bool plus_one = false;
};

class Norm : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().rows, D = GetParam().width;
  const DType dtype = GetParam().dtype;
  const bool plus_one = GetParam().plus_one;
  // bf16: the normalised value and the result are both rounded; once, where the weight is added to one.
  const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 100, 2e-3} : Tolerance{1e-5, 2e-6};
  const Tolerance of_y = plus_one && dtype == DType::kBF16 ? Tolerance{1.0 / 256, 1e-6} : tolerance;
  HostTensor x{random_tensor({T, D}, dtype, 1, 2.0, 0.3)},
      w{random_tensor({D}, dtype, 2, 0.5, plus_one ? 0.0 : 1.0)};
  HostTensor dy{random_tensor({T, D}, dtype, 3)}, y{{T, D}, dtype}, rstd{{T}, DType::kF32};
  OpExec ex;

  NormWeight weight() const { return {w, kEps, plus_one}; }
  Values factors() const { return sum_of(w.values(), Values(w.size(), plus_one ? 1.0 : 0.0)); }
};

TEST_P(Norm, Forward) {
  ops::rms_norm_forward(ex, y, rstd, x, weight());
  Values expected_rstd;
  expect_close(y.values(), reference_rms_norm(x.values(), factors(), kEps, &expected_rstd), of_y, "y");
  expect_close(rstd.values(), expected_rstd, {1e-6, 0}, "rstd");
}

TEST_P(Norm, AddForward) {
  const HostTensor residual = random_tensor({T, D}, dtype, 4);
  HostTensor sum({T, D}, dtype);
  ops::add_rms_norm_forward(ex, y, sum, rstd, x, residual, weight());
  expect_close(sum.values(), sum_of(x.values(), residual.values()), rounding_of(dtype), "sum");
  expect_close(y.values(), reference_rms_norm(sum.values(), factors(), kEps), of_y, "y");
  HostTensor aliased = x, y2 = y;
  ops::add_rms_norm_forward(ex, y2, aliased, rstd, aliased, residual, weight());
  EXPECT_TRUE(aliased == sum && y2 == y) << "sum may alias x";
  HostTensor in_place = x, sum2 = sum;
  ops::add_rms_norm_forward(ex, in_place, sum2, rstd, in_place, residual, weight());
  EXPECT_TRUE(in_place == y && sum2 == sum) << "y may be x";
}

TEST_P(Norm, AddForwardIsTheTwoPassesToTheBit) {
  const HostTensor residual = random_tensor({T, D}, dtype, 4);
  HostTensor sum({T, D}, dtype), sum2 = sum, y2 = y, rstd2 = rstd;
  ops::add_rms_norm_forward(ex, y, sum, rstd, x, residual, weight());
  ops::add(ex, sum2, residual, x);
  ops::rms_norm_forward(ex, y2, rstd2, sum2, weight());
  EXPECT_TRUE(sum == sum2 && y == y2 && rstd == rstd2);
}

TEST_P(Norm, Backward) {
  const Values wv = factors(), dyv = dy.values();
  const Values dx_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_rms_norm(v, wv, kEps), dyv); }, x.values());
  const Values dw_expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_rms_norm(x.values(), v, kEps), dyv); }, wv);
  ops::rms_norm_forward(ex, y, rstd, x, weight());
  HostTensor dx({T, D}, dtype), dw = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, dx, dw, dy, {x, rstd}, weight(), Accumulate::kOverwrite);
  expect_close(dx.values(), dx_expected, tolerance, "dx");
  expect_close(dw.values(), sum_of(dw_expected, Values(wv.size(), 0.25)), tolerance, "dw adds");

  const HostTensor passing = random_tensor({T, D}, dtype, 5);  // the gradient that goes by the norm
  HostTensor added = passing, dw2 = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, added, dw2, dy, {x, rstd}, weight(), Accumulate::kAdd);
  expect_close(added.values(), sum_of(dx_expected, passing.values()), tolerance, "dx adds");
  EXPECT_TRUE(dw2 == dw) << "whatever goes by";
  HostTensor aliased = dy, dw3 = filled({D}, DType::kF32, 0.25);
  ops::rms_norm_backward(ex, aliased, dw3, aliased, {x, rstd}, weight(), Accumulate::kOverwrite);
  EXPECT_TRUE(aliased == dx && dw3 == dw) << "dx may alias dy";
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST_P(Norm, BackwardOverwritesTheWeightsGradient) {
  ops::rms_norm_forward(ex, y, rstd, x, weight());
  for (const DType type : {DType::kF32, dtype})
    expect_overwrites({D}, type, [&](const GradientView& dw) {
      HostTensor dx({T, D}, dtype);
      ops::rms_norm_backward(ex, dx, dw, dy, {x, rstd}, weight(), Accumulate::kOverwrite);
    });
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (const auto& [rows, width] : test::kNormShapes)
      for (const bool plus_one : {false, true}) all.push_back({rows, width, dtype, plus_one});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, Norm, testing::ValuesIn(cases()), [](const auto& i) {
  return dtype_label(i.param.dtype) + "_" + std::to_string(i.param.rows) + "x" +
         std::to_string(i.param.width) + (i.param.plus_one ? "_plus_one" : "");
});

// Heads in the middle of wider rows, with a weight for the queries' and one for the keys'.
class QkNorm : public testing::TestWithParam<std::tuple<AttentionShape, std::int64_t, DType>> {
 protected:
  const AttentionShape s = std::get<0>(GetParam());
  const std::int64_t T = std::get<1>(GetParam()), N = s.heads + s.kv_heads, P = N * s.head_dim;
  const DType dtype = std::get<2>(GetParam());
  const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 100, 2e-3} : Tolerance{1e-5, 2e-6};
  const HostTensor qkv{random_tensor({T, s.qkv_width()}, dtype, 1, 2.0, 0.3)},
      q{random_tensor({s.head_dim}, dtype, 2, 0.5, 1.0)}, k{random_tensor({s.head_dim}, dtype, 3, 0.5, 1.0)},
      dy{random_tensor({T, s.qkv_width()}, dtype, 4)};
  HostTensor y = qkv, x{{T, P}, dtype}, rstd{{T, N}, DType::kF32};
  OpExec ex;
};

TEST_P(QkNorm, AgreesWithDouble) {
  const Values qv = q.values(), kv = k.values(), xv = qkv.values(), dyv = dy.values();
  ops::qk_norm_forward(ex, y, x, rstd, {q, k, kEps}, s);
  expect_close(y.values(), reference_qk_norm(xv, qv, kv, kEps, s), tolerance, "y");
  const auto width = static_cast<std::size_t>(s.qkv_width()), heads = static_cast<std::size_t>(P);
  for (std::size_t i = 0; i < qkv.size(); ++i) {
    if (i % width >= heads) {
      ASSERT_EQ(y.get(i), qkv.get(i)) << "values are left alone";
    } else {
      ASSERT_EQ(x.get(i / width * heads + i % width), qkv.get(i)) << "what was normed is kept";
    }
  }
  const auto loss = [&](const Values& v, const Values& qw, const Values& kw) {
    return dot(reference_qk_norm(v, qw, kw, kEps, s), dyv);
  };
  HostTensor d = dy, dq = filled({s.head_dim}, DType::kF32, 0.25),
             dk = filled({s.head_dim}, DType::kF32, 0.5);
  const TensorView dq_d = dq, dk_d = dk;
  ops::qk_norm_backward(ex, d, {dq_d, dk_d}, x, rstd, {q, k, kEps}, s);
  expect_close(d.values(), numeric_gradient([&](const Values& v) { return loss(v, qv, kv); }, xv), tolerance,
               "dqkv");
  const Values dq_expected = numeric_gradient([&](const Values&v) { return loss(xv, v, kv); }, qv),
               dk_expected = numeric_gradient([&](const Values&v) { return loss(xv, qv, v); }, kv);
  expect_close(dq.values(), sum_of(dq_expected, Values(qv.size(), 0.25)), tolerance, "dq adds");
  expect_close(dk.values(), sum_of(dk_expected, Values(kv.size(), 0.5)), tolerance, "dk adds");
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST_P(QkNorm, BackwardOverwritesTheWeightsGradients) {
  ops::qk_norm_forward(ex, y, x, rstd, {q, k, kEps}, s);
  for (const bool keys : {false, true})
    expect_overwrites({s.head_dim}, DType::kF32, [&](const GradientView& dw) {
      HostTensor d = dy, other = filled({s.head_dim}, DType::kF32, 0);
      const GradientView other_d = other;  // of one type with dw: a plain view would be added to
      ops::qk_norm_backward(ex, d, {keys ? other_d : dw, keys ? dw : other_d}, x, rstd, {q, k, kEps}, s);
    });
}

INSTANTIATE_TEST_SUITE_P(
    Heads, QkNorm,
    testing::Combine(testing::Values(AttentionShape{2, 1, 6, 1}, AttentionShape{4, 2, 16, 1},
                                     AttentionShape{3, 3, 20, 1}, AttentionShape{1, 1, 70, 1}),
                     testing::Values(0, 1, 5, 34), testing::Values(DType::kF32, DType::kBF16)),
    [](const auto& i) {
      const AttentionShape& s = std::get<0>(i.param);
      return fmt::format("{}_heads{}of{}_dim{}_{}", dtype_label(std::get<2>(i.param)), s.kv_heads, s.heads,
                         s.head_dim, std::get<1>(i.param));
    });

TEST(NormThreads, SameBits) {
  const std::int64_t T = 301, D = 200;
  expect_same_for_any_threads([&] {
    OpExec ex;
    const HostTensor x = random_tensor({T, D}, DType::kF32, 1), w = random_tensor({D}, DType::kF32, 2);
    const HostTensor dy = random_tensor({T, D}, DType::kF32, 3);
    HostTensor y({T, D}, DType::kF32), rstd({T}, DType::kF32), dx({T, D}, DType::kF32), dw({D}, DType::kF32);
    ops::rms_norm_forward(ex, y, rstd, x, {w, kEps});
    ops::rms_norm_backward(ex, dx, dw, dy, {x, rstd}, {w, kEps}, Accumulate::kOverwrite);
    return std::tuple(y, rstd, dx, dw);
  });
}

TEST(QkNormThreads, SameBits) {
  const AttentionShape s{4, 2, 24, 1};
  const HostTensor qkv = random_tensor({301, s.qkv_width()}, DType::kF32, 1),
                   w = random_tensor({24}, DType::kF32, 2);
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor y = qkv, x({301, 144}, DType::kF32), rstd({301, 6}, DType::kF32), dq({24}, DType::kF32),
               dk({24}, DType::kF32);
    const TensorView dq_d = dq, dk_d = dk;
    ops::qk_norm_forward(ex, y, x, rstd, {w, w, kEps}, s);
    ops::qk_norm_backward(ex, y, {dq_d, dk_d}, x, rstd, {w, w, kEps}, s);
    return std::tuple(y, x, rstd, dq, dk);
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
  const AttentionShape s{2, 1, 2, 1};  // qkv [4, 8], queries and keys [4, 6]
  HostTensor heads({4, 6}, DType::kF32), of_heads({4, 3}, DType::kF32), two = filled({2}, DType::kF32, 1);
  ops::qk_norm_forward(ex, x, heads, of_heads, {two, two, kEps}, s);
  EXPECT_THROW(ops::qk_norm_forward(ex, x, heads, of_heads, {two, w, kEps}, s), Error) << "weights of a head";
  EXPECT_THROW(ops::qk_norm_forward(ex, x, y, of_heads, {two, two, kEps}, s), Error) << "values are not kept";
  EXPECT_THROW(ops::qk_norm_forward(ex, x, heads, rstd, {two, two, kEps}, s), Error) << "rstd of each head";
}

TEST(NormDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView x = dry_tensor({6, 8}, DType::kBF16), w = dry_tensor({8}, DType::kBF16);
  const TensorView rstd = dry_tensor({6}, DType::kF32), dw = dry_tensor({8}, DType::kF32);
  ops::rms_norm_forward(ex, x, rstd, x, {w, kEps});
  ops::rms_norm_backward(ex, x, dw, x, {x, rstd}, {w, kEps}, Accumulate::kAdd);
  expect_booked(ex.ledger(), "rms_norm_forward", 4 * 48, 96 + 16, 96 + 24);
  expect_booked(ex.ledger(), "rms_norm_backward", 11 * 48, 3 * 96 + 16 + 24 + 32, 96 + 32);
  OpExec first(DeviceType::kDry);
  ops::rms_norm_backward(first, x, {dw, Accumulate::kOverwrite}, x, {x, rstd}, {w, kEps}, Accumulate::kAdd);
  expect_booked(first.ledger(), "rms_norm_backward", 11 * 48, 3 * 96 + 16 + 24, 96 + 32);
  const AttentionShape s{2, 1, 2, 1};
  const TensorView heads = dry_tensor({6, 6}, DType::kBF16), of_heads = dry_tensor({6, 3}, DType::kF32),
                   two = dry_tensor({2}, DType::kBF16), dtwo = dry_tensor({2}, DType::kF32);
  ops::qk_norm_forward(ex, x, heads, of_heads, {two, two, kEps}, s);
  ops::qk_norm_backward(ex, x, {dtwo, dtwo}, heads, of_heads, {two, two, kEps}, s);
  expect_booked(ex.ledger(), "qk_norm_forward", 4 * 36, 72 + 8, 2 * 72 + 72);
  expect_booked(ex.ledger(), "qk_norm_backward", 11 * 36, 2 * 72 + 72 + 8 + 16, 72 + 16);
}

}  // namespace
}  // namespace upmoe::test

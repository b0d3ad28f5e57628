#include "kernels/ops/adamw.h"

#include <gtest/gtest.h>

#include <tuple>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

AdamWStep step_number(std::int64_t step) {
  return {.lr = 3e-3f,
          .beta1 = 0.9f,
          .beta2 = 0.95f,
          .eps = 1e-8f,
          .weight_decay = 0.1f,
          .step = step,
          .grad_scale = 0.5f};
}

struct State {
  HostTensor master, m, v;
  explicit State(std::int64_t n)
      : master(random_tensor({n}, DType::kF32, 1)),
        m(filled({n}, DType::kF32, 0)),
        v(filled({n}, DType::kF32, 0)) {}
};

class AdamW : public testing::TestWithParam<std::tuple<DType, DType, std::int64_t>> {
 protected:
  const DType weight_type = std::get<0>(GetParam()), grad_type = std::get<1>(GetParam());
  const std::int64_t n = std::get<2>(GetParam());
  OpExec ex;
};

TEST_P(AdamW, FollowsTheReferenceForTenSteps) {
  State s(n);
  HostTensor weight({n}, weight_type);
  auto master = s.master.values(), m = s.m.values(), v = s.v.values();
  for (std::int64_t step = 1; step <= 10; ++step) {
    const HostTensor grad = random_tensor({n}, grad_type, static_cast<unsigned>(100 + step));
    ops::adamw(ex, weight, s.master, s.m, s.v, grad, step_number(step));
    for (std::size_t i = 0; i < master.size(); ++i)
      reference_adamw(master[i], m[i], v[i], grad.get(i), step_number(step));
    // Each step rounds m, v and master some four times by 2^-24 of values up to 1, and moves a weight by lr
    // at most: 40 roundings after ten steps.
    const Tolerance tolerance{0, 40 * std::ldexp(1.0, -24)};
    expect_close(s.m.values(), m, tolerance, "m");
    expect_close(s.v.values(), v, tolerance, "v");
    expect_close(s.master.values(), master, tolerance, "master");
  }
  const HostTensor rounded = tensor_of({n}, weight_type, s.master.values());
  EXPECT_TRUE(weight == rounded);
}

INSTANTIATE_TEST_SUITE_P(Types, AdamW,
                         testing::Combine(testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values<std::int64_t>(0, 1, 37, 4096, 10001)));

TEST(AdamWAlias, TheWeightMayBeTheMaster) {
  OpExec ex;
  State separate(100), same(100);
  HostTensor weight({100}, DType::kF32);
  const HostTensor grad = random_tensor({100}, DType::kF32, 2);
  ops::adamw(ex, weight, separate.master, separate.m, separate.v, grad, step_number(3));
  ops::adamw(ex, same.master, same.master, same.m, same.v, grad, step_number(3));
  EXPECT_TRUE(same.master == separate.master);
  EXPECT_TRUE(weight == separate.master);
}

// The first step moves every weight by lr in the direction of the gradient's sign, whatever its size.
TEST(AdamWStepOne, MovesByTheLearningRate) {
  OpExec ex;
  State s(3);
  s.master = filled({3}, DType::kF32, 1);
  const HostTensor grad = tensor_of({3}, DType::kF32, {1e-3, -5, 0});
  AdamWStep step;
  step.lr = 0.01f;
  ops::adamw(ex, s.master, s.master, s.m, s.v, grad, step);
  EXPECT_NEAR(s.master.get(0), 0.99, 1e-6);
  EXPECT_NEAR(s.master.get(1), 1.01, 1e-6);
  EXPECT_EQ(s.master.get(2), 1);
}

TEST(AdamWChecks, RejectWhatDoesNotFit) {
  OpExec ex;
  State s(4);
  HostTensor weight({4}, DType::kBF16), grad({4}, DType::kF32), longer({5}, DType::kF32),
      matrix({2, 2}, DType::kF32);
  const AdamWStep step;
  EXPECT_NO_THROW(ops::adamw(ex, weight, s.master, s.m, s.v, grad, step));
  EXPECT_THROW(ops::adamw(ex, longer, s.master, s.m, s.v, grad, step), Error);
  EXPECT_THROW(ops::adamw(ex, weight, weight, s.m, s.v, grad, step), Error);
  EXPECT_THROW(ops::adamw(ex, weight, s.master, longer, s.v, grad, step), Error);
  EXPECT_THROW(ops::adamw(ex, weight, s.master, s.m, weight, grad, step), Error);
  EXPECT_THROW(ops::adamw(ex, weight, s.master, s.m, s.v, longer, step), Error);
  EXPECT_THROW(ops::adamw(ex, weight, s.master, s.m, s.v, matrix, step), Error);
  AdamWStep zeroth;
  zeroth.step = 0;
  EXPECT_THROW(ops::adamw(ex, weight, s.master, s.m, s.v, grad, zeroth), Error);
}

TEST(AdamWLedger, BooksOnTheDryDevice) {
  OpExec dry(DeviceType::kDry);
  const TensorView f32 = dry_tensor({10}, DType::kF32), bf16 = dry_tensor({10}, DType::kBF16);
  ops::adamw(dry, bf16, f32, f32, f32, bf16, AdamWStep{});
  expect_booked(dry.ledger(), "adamw", 140, 3 * 40 + 20, 3 * 40 + 20);
}

}  // namespace
}  // namespace upmoe::test

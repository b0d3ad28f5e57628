#include "kernels/ops/expert_ffn.h"

#include <gtest/gtest.h>

#include <optional>

#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

using Values = std::vector<double>;

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

// Rows of experts, `counts` of each, picked out of tokens; what the ops write begins as NaN, what they add to as it is.
struct Problem {
  std::vector<std::int64_t> counts;
  std::int64_t D, F;
  DType dtype;

  std::int64_t E = static_cast<std::int64_t>(counts.size()), R = 0, T = 0;
  Offsets offsets = offsets_of(counts);
  HostTensor index_R{{0}, DType::kI32};
  HostTensor x{{0}, dtype}, dy = x, gate_up_w = random_tensor({E, 2 * F, D}, dtype, 3, 0.5),
                            down_w = random_tensor({E, D, F}, dtype, 4, 0.5), weight = x;

  Problem(std::vector<std::int64_t> rows, std::int64_t width, std::int64_t neurons, DType type)
      : counts(std::move(rows)), D(width), F(neurons), dtype(type) {
    R = offsets.back();
    T = R / 2 + 1;
    index_R = HostTensor({R}, DType::kI32);
    for (std::int64_t r = 0; r < R; ++r)
      index_R.set(static_cast<std::size_t>(r), static_cast<double>(r * 7 % (3 * T)));
    x = random_tensor({T, D}, dtype, 1);
    dy = random_tensor({T, D}, dtype, 2);
    weight = random_tensor({R}, DType::kF32, 5, 0.5);
  }
  std::int64_t token(std::int64_t r) const {
    return static_cast<std::int64_t>(index_R.get(static_cast<std::size_t>(r))) / 3;
  }
  ops::PickedRows picked(const HostTensor& from) const { return {from, index_R, 3}; }
  ops::ExpertFfn ffn(bool fused) const { return {gate_up_w, down_w, weight, offsets, fused}; }
};

// Step by step, with what forward kept or with what can be made of gate_up; or fused.
enum class Way { kKept, kMadeAgain, kFused };

struct Results {
  HostTensor y, dx, dweight, dgate_up_w, ddown_w;
  bool operator==(const Results&) const = default;
};

// The weights' gradients begin as random numbers that are added to, or as what `before` says: overwritten if it is NaN.
Results run(Exec& ex, const Problem& p, Way way, std::optional<double> before = {}) {
  const bool fused = way == Way::kFused;
  const ops::ExpertFfn f = p.ffn(fused);
  const std::int64_t G = 2 * p.F;
  const auto empty = [&](Shape shape, DType dtype) { return filled(shape, dtype, NAN); };
  const auto begin = [&](Shape shape, unsigned seed) {
    return before ? filled(shape, p.dtype, *before) : random_tensor(shape, p.dtype, seed);
  };
  const Accumulate mode = before && std::isnan(*before) ? Accumulate::kOverwrite : Accumulate::kAdd;
  Results out{empty({p.R, p.D}, p.dtype), empty({p.R, p.D}, p.dtype), empty({p.R}, DType::kF32),
              begin({p.E, G, p.D}, 6), begin({p.E, p.D, p.F}, 7)};
  HostTensor x_R = empty({p.R, p.D}, p.dtype), gate_up = empty({p.R, G}, p.dtype),
             h = empty({p.R, p.F}, p.dtype), dy_R = x_R, dgate_up = gate_up;
  ops::ExpertActivations kept{{}, gate_up, {}};
  if (!fused) kept.x_RD = x_R;
  if (way == Way::kKept) kept.h_RF = h;
  ops::expert_ffn_forward(ex, out.y, kept, p.picked(p.x), f);
  HostTensor y_alone = empty({p.R, p.D}, p.dtype);
  ops::expert_ffn_forward(ex, y_alone, {}, p.picked(p.x), f);
  EXPECT_TRUE(y_alone == out.y) << "what is kept changes nothing";
  ops::ExpertGradients g{out.dx, out.dweight, dgate_up, {}, {}};
  (fused ? g.h_RF : g.dy_RD) = fused ? h.view() : dy_R.view();
  ops::expert_ffn_backward(ex, g, p.picked(p.dy), gate_up, f);
  ops::WeightOperands o{p.picked(p.x), p.picked(p.dy), dgate_up, {}, gate_up};
  if (!fused) {
    o.x = {x_R, {}};
    o.dy = {dy_R, {}};
  }
  if (way != Way::kMadeAgain) o.h_RF = h;
  ops::expert_ffn_wgrad(ex, {out.dgate_up_w, mode}, {out.ddown_w, mode}, o, f);
  finish_ops();
  return out;
}

struct Reference {
  Values y, dx, dweight, dgate_up_w, ddown_w;
};

Reference reference(const Problem& p) {
  const std::int64_t D = p.D, F = p.F, G = 2 * F;
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const Values x = p.x.values(), dy = p.dy.values(), wu = p.gate_up_w.values(), wd = p.down_w.values();
  Reference out{Values(size(p.R * D)), Values(size(p.R * D)), Values(size(p.R)),
                random_tensor({p.E, G, D}, p.dtype, 6).values(),
                random_tensor({p.E, D, F}, p.dtype, 7).values()};
  for (std::int64_t e = 0; e < p.E; ++e)
    for (std::int64_t r = p.offsets[size(e)]; r < p.offsets[size(e + 1)]; ++r) {
      const std::int64_t t = p.token(r);
      const double w = p.weight.get(size(r));
      for (std::int64_t f = 0; f < F; ++f) {
        const std::int64_t gate_row = e * G + 2 * f, up_row = gate_row + 1;
        double gate = 0, up = 0, dh = 0;
        for (std::int64_t d = 0; d < D; ++d) {
          gate += x[at(t, D, d)] * wu[at(gate_row, D, d)];
          up += x[at(t, D, d)] * wu[at(up_row, D, d)];
          dh += dy[at(t, D, d)] * wd[at(e * D + d, F, f)];
        }
        const double s = 1 / (1 + std::exp(-gate)), silu = gate * s;
        const double dgate = dh * w * up * (s + silu * (1 - s)), dup = dh * w * silu;
        out.dweight[size(r)] += dh * silu * up;
        for (std::int64_t d = 0; d < D; ++d) {
          out.y[at(r, D, d)] += w * silu * up * wd[at(e * D + d, F, f)];
          out.dx[at(r, D, d)] += dgate * wu[at(gate_row, D, d)] + dup * wu[at(up_row, D, d)];
          out.dgate_up_w[at(gate_row, D, d)] += dgate * x[at(t, D, d)];
          out.dgate_up_w[at(up_row, D, d)] += dup * x[at(t, D, d)];
          out.ddown_w[at(e * D + d, F, f)] += dy[at(t, D, d)] * w * silu * up;
        }
      }
    }
  return out;
}

class ExpertFfn : public testing::TestWithParam<DType> {
 protected:
  OpExec ex;
};

void expect_reference(const Results& found, const Problem& p, const Tolerance& tolerance) {
  const Reference expected = reference(p);
  expect_close(found.y.values(), expected.y, tolerance, "y");
  expect_close(found.dx.values(), expected.dx, tolerance, "dx");
  expect_close(found.dweight.values(), expected.dweight, tolerance, "dweight");
  expect_close(found.dgate_up_w.values(), expected.dgate_up_w, tolerance, "gate and up weights");
  expect_close(found.ddown_w.values(), expected.ddown_w, tolerance, "down weights");
}

TEST_P(ExpertFfn, MatchesTheReference) {
  // In bf16 every step rounds.
  const Tolerance tolerance =
      GetParam() == DType::kBF16 ? Tolerance{1.0 / 32, 1.0 / 64} : Tolerance{1e-5, 4e-6};
  for (const Problem& p : {Problem({1}, 1, 1, GetParam()), Problem({3, 0, 7, 1}, 6, 5, GetParam()),
                           Problem({17, 48, 0, 30}, 40, 24, GetParam()), Problem({0, 0}, 4, 3, GetParam())}) {
    const Results found = run(ex, p, Way::kKept);
    EXPECT_TRUE(run(ex, p, Way::kMadeAgain) == found) << "hidden rows made again";
    expect_reference(found, p, tolerance);
    // On a processor the fused ops are these steps.
    if (!on_gpu()) {
      EXPECT_TRUE(run(ex, p, Way::kFused) == found) << "fused";
    }
    EXPECT_EQ(ex.scratch_used(), 0u);
  }
}

void expect_overwritten(Exec& ex, const Problem& p, Way way) {
  const Results over = run(ex, p, way, NAN), onto = run(ex, p, way, 0.0);
  EXPECT_EQ(over.dgate_up_w.values(), onto.dgate_up_w.values());
  EXPECT_EQ(over.ddown_w.values(), onto.ddown_w.values());
}

// Experts without rows get zeros.
TEST_P(ExpertFfn, OverwritesTheWeightsGradients) {
  for (const Problem& p : {Problem({3, 0, 7, 1}, 6, 5, GetParam()), Problem({0, 0}, 4, 3, GetParam())}) {
    expect_overwritten(ex, p, Way::kKept);
    expect_overwritten(ex, p, Way::kMadeAgain);
  }
}
TEST(FusedExperts, OverwriteTheWeightsGradients) {
  OpExec ex;
  for (const std::vector<std::int64_t>& rows : {std::vector<std::int64_t>{0, 1, 129, 0}, {0, 0}})
    expect_overwritten(ex, Problem(rows, 256, 128, DType::kBF16), Way::kFused);
}

double distance(const HostTensor& a, const HostTensor& b) {
  const std::vector<double> x = a.values(), y = b.values();
  return relative_distance({x.begin(), x.end()}, {y.begin(), y.end()});
}

TEST(FusedExperts, KeepNeitherPickedNorHiddenRows) {
  OpExec dry(DeviceType::kDry);
  const auto rows16 = [](Shape shape) { return dry_tensor(shape, DType::kBF16); };
  const ops::ExpertFfn f{rows16({2, 8, 6}),
                         rows16({2, 6, 4}),
                         dry_tensor({5}, DType::kF32),
                         {dry_tensor({3}, DType::kI32)},
                         true};
  const ops::PickedRows rows{rows16({3, 6}), dry_tensor({5}, DType::kI32), 2};
  const TensorView gate_up = rows16({5, 8});
  EXPECT_NO_THROW(ops::expert_ffn_forward(dry, rows16({5, 6}), {{}, gate_up, {}}, rows, f));
  EXPECT_THROW(ops::expert_ffn_forward(dry, rows16({5, 6}), {rows16({5, 6}), gate_up, {}}, rows, f), Error);
  EXPECT_THROW(ops::expert_ffn_forward(dry, rows16({5, 6}), {{}, gate_up, rows16({5, 4})}, rows, f), Error);
}

// Widths of whole tiles: experts without rows, with one, with a tile and a row more.
TEST(FusedExperts, MatchTheReferenceAndTheOtherWay) {
  OpExec ex;
  for (const Problem& p :
       {Problem({0, 1, 129, 40}, 256, 128, DType::kBF16), Problem({64, 0}, 512, 128, DType::kBF16),
        Problem({0, 0}, 256, 128, DType::kBF16)}) {
    const Results fused = run(ex, p, Way::kFused), streams = run(ex, p, Way::kKept);
    expect_reference(fused, p, {1.0 / 32, 1.0 / 64});
    if (p.R == 0) continue;
    EXPECT_LE(distance(streams.y, fused.y), 1e-2);
    EXPECT_LE(distance(streams.dx, fused.dx), 1e-2);
    EXPECT_LE(distance(streams.dweight, fused.dweight), 1e-2);
    EXPECT_LE(distance(streams.dgate_up_w, fused.dgate_up_w), 1e-2);
    EXPECT_LE(distance(streams.ddown_w, fused.ddown_w), 1e-2);
    EXPECT_EQ(ex.scratch_used(), 0u);
  }
}
INSTANTIATE_TEST_SUITE_P(DTypes, ExpertFfn, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& i) { return dtype_label(i.param); });

TEST(ExpertFfnLedger, WhatIsMadeAgainIsNotBooked) {
  OpExec dry(DeviceType::kDry);
  const auto rows16 = [](Shape shape) { return dry_tensor(shape, DType::kBF16); };
  const std::vector<std::int64_t> offsets{0, 2, 5};
  const ops::ExpertFfn f{rows16({2, 8, 6}),
                         rows16({2, 6, 4}),
                         dry_tensor({5}, DType::kF32),
                         {dry_tensor({3}, DType::kI32), offsets}};
  const ops::PickedRows rows{rows16({3, 6}), dry_tensor({5}, DType::kI32), 2};
  const ops::ExpertActivations kept{rows16({5, 6}), rows16({5, 8}), {}};
  const ops::ExpertGradients g{
      rows16({5, 6}), dry_tensor({5}, DType::kF32), rows16({5, 8}), rows16({5, 6}), {}};
  const ops::WeightOperands o{{kept.x_RD, {}}, {g.dy_RD, {}}, g.dgate_up_RG, {}, kept.gate_up_RG};
  ops::expert_ffn_forward(dry, rows16({5, 6}), kept, rows, f);
  ops::expert_ffn_backward(dry, g, rows, kept.gate_up_RG, f);
  ops::expert_ffn_wgrad(dry, rows16({2, 8, 6}), {}, o, f);  // the second product is frozen
  ops::expert_ffn_wgrad(dry, {}, rows16({2, 6, 4}), o, f);
  const double up = 2.0 * 5 * 8 * 6, down = 2.0 * 5 * 4 * 6, swiglu = 5 * 4;
  EXPECT_EQ(dry.ledger().total().flops, 3 * up + 3 * down + (6 + 15) * swiglu);
  EXPECT_EQ(dry.ledger().total().model_flops, 3 * up + 3 * down);
}

// The model's FLOPs are those of its products, whatever the ops are called that compute them.
TEST(ExpertFfnLedger, FusedBooksTheSameModelWork) {
  for (const bool fused : {false, true}) {
    OpExec dry(DeviceType::kDry);
    const auto rows16 = [](Shape shape) { return dry_tensor(shape, DType::kBF16); };
    const std::vector<std::int64_t> offsets{0, 2, 5};
    const ops::ExpertFfn f{rows16({2, 8, 6}),
                           rows16({2, 6, 4}),
                           dry_tensor({5}, DType::kF32),
                           {dry_tensor({3}, DType::kI32), offsets},
                           fused};
    const ops::PickedRows rows{rows16({3, 6}), dry_tensor({5}, DType::kI32), 2};
    const TensorView x = rows16({5, 6}), gate_up = rows16({5, 8}), h = rows16({5, 4});
    ops::ExpertGradients g{rows16({5, 6}), dry_tensor({5}, DType::kF32), rows16({5, 8}), {}, {}};
    (fused ? g.h_RF : g.dy_RD) = fused ? h : rows16({5, 6});
    ops::expert_ffn_forward(dry, rows16({5, 6}), {{}, gate_up, {}}, rows, f);
    ops::expert_ffn_backward(dry, g, rows, gate_up, f);
    const ops::PickedRows plain_x{x, {}}, plain_dy{g.dy_RD, {}};
    ops::expert_ffn_wgrad(dry, rows16({2, 8, 6}), rows16({2, 6, 4}),
                          {fused ? rows : plain_x, fused ? rows : plain_dy, g.dgate_up_RG, h, gate_up}, f);
    EXPECT_EQ(dry.ledger().total().model_flops, 2.0 * 3 * 5 * (8 * 6 + 6 * 4)) << fused;
    EXPECT_EQ(dry.ledger().entries().contains("experts_up"), fused);
  }
}

}  // namespace
}  // namespace upmoe::test

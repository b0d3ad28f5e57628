// The fused ops of the routed experts one by one, against double. On a GPU they take bf16 in whole tiles.

#include "kernels/ops/experts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <optional>

#include "kernels/core/expert_variants.h"
#include "kernels/core/gpu.h"
#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

using Values = std::vector<double>;

struct Case {
  std::vector<std::int64_t> counts;
  std::int64_t D, F;
  DType dtype;
};

std::vector<Case> cases() {
  // The second: pairs of tiles and several parts in every product.
  std::vector<Case> all{{{0, 3, 130, 1}, 256, 128, DType::kBF16},
                        {{70, 0, 5}, 512, 256, DType::kBF16},
                        {{0, 0}, 256, 128, DType::kBF16}};
  if (on_gpu()) return all;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    all.push_back({{3, 0, 7, 1}, 6, 5, dtype});
    all.push_back({{1}, 1, 1, dtype});
  }
  return all;
}

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

class FusedOps : public testing::TestWithParam<Case> {
 protected:
  // Of rows picked out of tokens, three choices each.
  const Case& c = GetParam();
  std::int64_t E = static_cast<std::int64_t>(c.counts.size()), D = c.D, F = c.F, G = 2 * c.F;
  Offsets offsets = offsets_of(c.counts);
  std::int64_t R = offsets.back(), T = R / 2 + 1;
  HostTensor index_R{{R}, DType::kI32};
  HostTensor tokens_TD = random_tensor({T, D}, c.dtype, 1), up_w = random_tensor({E, G, D}, c.dtype, 2, 0.1),
             down_w = random_tensor({E, D, F}, c.dtype, 3, 0.1),
             weight_R = random_tensor({R}, DType::kF32, 4), gate_up_RG = random_tensor({R, G}, c.dtype, 5),
             rows_RD = random_tensor({R, D}, c.dtype, 6), rows_RF = random_tensor({R, F}, c.dtype, 7);
  OpExec ex;

  FusedOps() {
    for (std::int64_t r = 0; r < R; ++r)
      index_R.set(static_cast<std::size_t>(r), static_cast<double>(r * 7 % (3 * T)));
  }
  ops::PickedRows picked() const { return {tokens_TD, index_R, 3}; }
  ops::ExpertFfn ffn() const { return {up_w, down_w, weight_R, offsets, true}; }
  std::int64_t token(std::int64_t r) const {
    return static_cast<std::int64_t>(index_R.get(static_cast<std::size_t>(r))) / 3;
  }
  template <class Body>
  void for_rows(const Body& body) const {  // body(expert, row)
    for (std::int64_t e = 0; e < E; ++e)
      for (auto r = offsets[static_cast<std::size_t>(e)]; r < offsets[static_cast<std::size_t>(e) + 1]; ++r)
        body(e, r);
  }
  HostTensor empty(Shape shape, DType dtype) const { return filled(shape, dtype, NAN); }
  // Results are rounded once; where a processor rounds the operand of a last step too, that is within it.
  void expect(const HostTensor& found, const Values& wanted, const char* name) {
    finish_ops();
    const Values values = found.values();
    if (wanted.empty()) return;
    EXPECT_LE(relative_distance({wanted.begin(), wanted.end()}, {values.begin(), values.end()}, 1e-6),
              c.dtype == DType::kBF16 ? 6e-3 : 1e-5)
        << name;
    EXPECT_EQ(ex.scratch_used(), 0u);
  }
  std::size_t count(std::int64_t n) const { return static_cast<std::size_t>(n); }
};

TEST_P(FusedOps, Up) {
  HostTensor gate_up = empty({R, G}, c.dtype), h = empty({R, F}, c.dtype);
  ops::experts_up(ex, gate_up, h, picked(), ffn());
  const Values x = tokens_TD.values(), w = up_w.values();
  Values want_gate_up(count(R * G)), want_h(count(R * F));
  for_rows([&](std::int64_t e, std::int64_t r) {
    for (std::int64_t g = 0; g < G; ++g)
      for (std::int64_t d = 0; d < D; ++d)
        want_gate_up[at(r, G, g)] += x[at(token(r), D, d)] * w[at(e * G + g, D, d)];
    for (std::int64_t f = 0; f < F; ++f) {
      const double gate = want_gate_up[at(r, G, 2 * f)], up = want_gate_up[at(r, G, 2 * f + 1)];
      want_h[at(r, F, f)] = weight_R.get(count(r)) * gate / (1 + std::exp(-gate)) * up;
    }
  });
  expect(gate_up, want_gate_up, "gate_up");
  expect(h, want_h, "h");
}

TEST_P(FusedOps, Rows) {
  HostTensor y = empty({R, D}, c.dtype), dx = empty({R, D}, c.dtype);
  ops::experts_rows(ex, y, rows_RF, down_w, Transpose::kYes, offsets);
  ops::experts_rows(ex, dx, gate_up_RG, up_w, Transpose::kNo, offsets);
  const Values h = rows_RF.values(), g = gate_up_RG.values(), wd = down_w.values(), wu = up_w.values();
  Values want_y(count(R * D)), want_dx(count(R * D));
  for_rows([&](std::int64_t e, std::int64_t r) {
    for (std::int64_t d = 0; d < D; ++d) {
      for (std::int64_t f = 0; f < F; ++f) want_y[at(r, D, d)] += h[at(r, F, f)] * wd[at(e * D + d, F, f)];
      for (std::int64_t i = 0; i < G; ++i) want_dx[at(r, D, d)] += g[at(r, G, i)] * wu[at(e * G + i, D, d)];
    }
  });
  expect(y, want_y, "y");
  expect(dx, want_dx, "dx");
}

TEST_P(FusedOps, DHidden) {
  HostTensor dgate_up = empty({R, G}, c.dtype), h = empty({R, F}, c.dtype), dweight = empty({R}, DType::kF32);
  ops::experts_dhidden(ex, {dgate_up, h, dweight}, picked(), gate_up_RG, ffn());
  const Values dy = tokens_TD.values(), w = down_w.values();
  Values want_dgate_up(count(R * G)), want_h(count(R * F)), want_dweight(count(R));
  for_rows([&](std::int64_t e, std::int64_t r) {
    const double weight = weight_R.get(count(r));
    for (std::int64_t f = 0; f < F; ++f) {
      double dh = 0;
      for (std::int64_t d = 0; d < D; ++d) dh += dy[at(token(r), D, d)] * w[at(e * D + d, F, f)];
      const double gate = gate_up_RG.get(at(r, G, 2 * f)), up = gate_up_RG.get(at(r, G, 2 * f + 1));
      const double s = 1 / (1 + std::exp(-gate)), silu = gate * s;
      want_dgate_up[at(r, G, 2 * f)] = dh * weight * up * (s + silu * (1 - s));
      want_dgate_up[at(r, G, 2 * f + 1)] = dh * weight * silu;
      want_h[at(r, F, f)] = weight * silu * up;
      want_dweight[count(r)] += dh * silu * up;
    }
  });
  expect(dgate_up, want_dgate_up, "dgate_up");
  expect(h, want_h, "h");
  expect(dweight, want_dweight, "dweight");
}

// Both products of weights' gradients: the picked side is x, or dy; and rows that were picked before.
TEST_P(FusedOps, WeightGradients) {
  const Values plain = gate_up_RG.values(), hidden = rows_RF.values(), x = tokens_TD.values(),
               rows = rows_RD.values();
  for (const Accumulate mode : {Accumulate::kOverwrite, Accumulate::kAdd}) {
    const bool add = mode == Accumulate::kAdd;
    HostTensor up = add ? random_tensor({E, G, D}, c.dtype, 8) : empty({E, G, D}, c.dtype), up_of_rows = up,
               down = add ? random_tensor({E, D, F}, c.dtype, 9) : empty({E, D, F}, c.dtype);
    Values want_up = add ? up.values() : Values(count(E * G * D)), want_up_of_rows = want_up,
           want_down = add ? down.values() : Values(count(E * D * F));
    ops::experts_wgrad(ex, up, {gate_up_RG, {}}, picked(), offsets, mode);
    ops::experts_wgrad(ex, up_of_rows, {gate_up_RG, {}}, {rows_RD, {}}, offsets, mode);
    ops::experts_wgrad(ex, down, picked(), {rows_RF, {}}, offsets, mode);
    for_rows([&](std::int64_t e, std::int64_t r) {
      for (std::int64_t d = 0; d < D; ++d) {
        for (std::int64_t g = 0; g < G; ++g) {
          want_up[at(e * G + g, D, d)] += plain[at(r, G, g)] * x[at(token(r), D, d)];
          want_up_of_rows[at(e * G + g, D, d)] += plain[at(r, G, g)] * rows[at(r, D, d)];
        }
        for (std::int64_t f = 0; f < F; ++f)
          want_down[at(e * D + d, F, f)] += x[at(token(r), D, d)] * hidden[at(r, F, f)];
      }
    });
    expect(up, want_up, "up");
    expect(up_of_rows, want_up_of_rows, "up of plain rows");
    expect(down, want_down, "down");
  }
}

// Whatever a table names, the bits are the same; and the ops ask it: what is not compiled is an error. The CPU has one
// way.
TEST_P(FusedOps, VariantsOfATable) {
  const auto up = [&] {
    std::vector<HostTensor> out{empty({R, G}, c.dtype), empty({R, F}, c.dtype)};
    ops::experts_up(ex, out[0], out[1], picked(), ffn());
    return out;
  };
  const auto rows = [&](const HostTensor& in, const HostTensor& w, Transpose transpose) {
    std::vector<HostTensor> out{empty({R, D}, c.dtype)};
    ops::experts_rows(ex, out[0], in, w, transpose, offsets);
    return out;
  };
  const auto dhidden = [&] {
    std::vector<HostTensor> out{empty({R, G}, c.dtype), empty({R, F}, c.dtype), empty({R}, DType::kF32)};
    ops::experts_dhidden(ex, {out[0], out[1], out[2]}, picked(), gate_up_RG, ffn());
    return out;
  };
  const auto dweights = [&](Shape shape, const ops::PickedRows& dy, const ops::PickedRows& x) {
    std::vector<HostTensor> out{empty(shape, c.dtype)};
    ops::experts_wgrad(ex, out[0], dy, x, offsets, Accumulate::kOverwrite);
    return out;
  };
  const std::function<std::vector<HostTensor>()> kernels[kExpertKernels] = {
      up,
      [&] { return rows(rows_RF, down_w, Transpose::kYes); },
      [&] { return rows(gate_up_RG, up_w, Transpose::kNo); },
      dhidden,
      [&] {
        return dweights({E, G, D}, {gate_up_RG, {}}, picked());
      },
      [&] {
        return dweights({E, D, F}, picked(), {rows_RF, {}});
      }};
  const std::string device = on_gpu() ? gpu::device_name(0) : "none";
  for (int i = 0; i < kExpertKernels; ++i) {
    const ExpertProductShape shape{static_cast<ExpertKernel>(i), E, D, F, R};
    const auto by = [&](const ExpertVariant& variant) {
      ExpertVariants table;
      table.tables[device] = {{shape, variant}};
      static_cast<Exec&>(ex).expert_variants = &table;
      const auto out = kernels[i]();
      finish_ops();
      static_cast<Exec&>(ex).expert_variants = nullptr;
      std::vector<Values> values;
      for (const HostTensor& t : out) values.push_back(t.values());
      return values;
    };
    const auto compiled = variants_of(shape.kernel);
    std::optional<std::vector<Values>> first;
    for (const ExpertVariant& variant : compiled) {
      if (!why_not(variant, shape).empty()) continue;
      const auto values = by(variant);
      if (!first) first = values;
      EXPECT_EQ(values, *first) << words_of(shape) << ": " << words_of(variant);
    }
    ExpertVariant none = compiled[0];
    none.stages += 7;
    if (on_gpu() && R > 0)
      EXPECT_THAT([&] { by(none); }, testing::ThrowsMessage<Error>(
                                         testing::HasSubstr("not among the variants of this program")));
    else
      EXPECT_NO_THROW(by(none));
    static_cast<Exec&>(ex).expert_variants = nullptr;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, FusedOps, testing::ValuesIn(cases()));

TEST(FusedOpsLedger, WhatTheyBook) {
  OpExec dry(DeviceType::kDry);
  const auto rows16 = [](Shape shape) { return dry_tensor(shape, DType::kBF16); };
  const std::vector<std::int64_t> on_host{0, 2, 2, 5};
  const ExpertRows offsets{dry_tensor({4}, DType::kI32), on_host};
  const TensorView weight = dry_tensor({5}, DType::kF32), index = dry_tensor({5}, DType::kI32);
  const ops::ExpertFfn f{rows16({3, 8, 6}), rows16({3, 6, 4}), weight, offsets, true};
  const ops::PickedRows picked{rows16({7, 6}), index, 2};
  const double picks = 5 * 6 * 2 + 5 * 4, up_w = 2 * 8 * 6 * 2,
               down_w = 2 * 6 * 4 * 2;  // of two experts with rows
  ops::experts_up(dry, rows16({5, 8}), rows16({5, 4}), picked, f);
  expect_booked(dry.ledger(), "experts_up", 2.0 * 5 * 8 * 6, picks + up_w + 20, 5 * 8 * 2 + 5 * 4 * 2);
  ops::experts_rows(dry, rows16({5, 6}), rows16({5, 4}), f.down_eDF, Transpose::kYes, offsets);
  expect_booked(dry.ledger(), "experts_rows", 2.0 * 5 * 6 * 4, 5 * 4 * 2 + down_w, 5 * 6 * 2);
  ops::experts_dhidden(dry, {rows16({5, 8}), rows16({5, 4}), weight}, picked, rows16({5, 8}), f);
  expect_booked(dry.ledger(), "experts_dhidden", 2.0 * 5 * 6 * 4, picks + down_w + 5 * 8 * 2 + 20,
                5 * 8 * 2 + 5 * 4 * 2 + 20);
  ops::experts_wgrad(dry, rows16({3, 6, 4}), picked, {rows16({5, 4}), {}}, offsets, Accumulate::kAdd);
  expect_booked(dry.ledger(), "experts_wgrad", 2.0 * 5 * 6 * 4, picks + 5 * 4 * 2 + down_w, down_w);
  EXPECT_EQ(dry.ledger().total().model_flops, dry.ledger().total().flops);
}

TEST(FusedOpsChecks, BothSidesPicked) {
  OpExec dry(DeviceType::kDry);
  const ops::PickedRows picked{dry_tensor({7, 6}, DType::kBF16), dry_tensor({5}, DType::kI32), 2};
  const ExpertRows offsets{dry_tensor({4}, DType::kI32), {}};
  EXPECT_THROW(
      ops::experts_wgrad(dry, dry_tensor({3, 6, 6}, DType::kBF16), picked, picked, offsets, Accumulate::kAdd),
      Error);
}

}  // namespace
}  // namespace upmoe::test

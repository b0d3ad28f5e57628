#include "kernels/ops/activation.h"

#include <gtest/gtest.h>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

// An activation's ops and what they compute.
struct Gating {
  const char* name;
  decltype(&ops::swiglu_forward) forward;
  decltype(&ops::swiglu_backward) backward;
  double (*act)(double);
};
const Gating kSwiglu{"swiglu", &ops::swiglu_forward, &ops::swiglu_backward, reference_silu};
const Gating kGeglu{"geglu", &ops::geglu_forward, &ops::geglu_backward, reference_gelu_tanh};

struct Case {
  std::int64_t rows, width;
  DType dtype;
  const Gating* gating = &kSwiglu;
};

std::string label(const testing::TestParamInfo<Case>& info) {
  return dtype_label(info.param.dtype) + "_" + std::to_string(info.param.rows) + "x" +
         std::to_string(info.param.width) + (info.param.gating == &kGeglu ? "_geglu" : "");
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (auto [rows, width] : {std::pair{1, 1}, {3, 14}, {5, 16}, {40, 28}, {3, 176}, {2, 83}, {0, 16}})
      all.push_back({rows, width, dtype});
  return all;
}

std::vector<Case> gated_cases() {
  std::vector<Case> all = cases();
  for (Case c : cases()) {
    c.gating = &kGeglu;
    all.push_back(c);
  }
  return all;
}

class Gated : public testing::TestWithParam<Case> {
 protected:
  const Gating& g = *GetParam().gating;
  const std::int64_t R = GetParam().rows, F = GetParam().width;
  const DType dtype = GetParam().dtype;
  HostTensor gate_up{random_tensor({R, 2 * F}, dtype, 1, 3.0)}, dh{random_tensor({R, F}, dtype, 2)};
  HostTensor weight{random_tensor({R}, DType::kF32, 3, 0.3, 0.5)};
  OpExec ex;
};

TEST_P(Gated, Forward) {
  HostTensor h({R, F}, dtype);
  g.forward(ex, h, gate_up, {});
  expect_close(h.values(), reference_gated(g.act, gate_up.values(), {}, static_cast<std::size_t>(R)),
               rounding_of(dtype), "h");
  const ConstTensorView weight_R = weight;
  g.forward(ex, h, gate_up, weight_R);
  expect_close(h.values(),
               reference_gated(g.act, gate_up.values(), weight.values(), static_cast<std::size_t>(R)),
               rounding_of(dtype), "weighted h");
}

TEST_P(Gated, Backward) {
  const auto rows = static_cast<std::size_t>(R);
  const Values weights = weight.values(), dhv = dh.values(), pairs = gate_up.values();
  const auto loss = [&](const Values& v, const Values& w) {
    return dot(reference_gated(g.act, v, w, rows), dhv);
  };
  const Values d_expected = numeric_gradient([&](const Values& v) { return loss(v, weights); }, pairs);
  const Values dw_expected = numeric_gradient([&](const Values& v) { return loss(pairs, v); }, weights);

  HostTensor d({R, 2 * F}, dtype), dweight({R}, DType::kF32);
  const ConstTensorView weight_R = weight;
  const TensorView dweight_R = dweight;
  g.backward(ex, d, dweight_R, dh, gate_up, weight_R);
  expect_close(d.values(), d_expected, rounding_of(dtype), "dgate_up");
  expect_close(dweight.values(), dw_expected, {1e-5, 1e-5}, "dweight");

  HostTensor aliased = gate_up;
  g.backward(ex, aliased, dweight_R, dh, aliased, weight_R);
  EXPECT_TRUE(aliased == d) << "dgate_up may alias gate_up";

  g.backward(ex, d, {}, dh, gate_up, {});
  expect_close(d.values(), numeric_gradient([&](const Values& v) { return loss(v, {}); }, pairs),
               rounding_of(dtype), "unweighted dgate_up");
}

INSTANTIATE_TEST_SUITE_P(Shapes, Gated, testing::ValuesIn(gated_cases()), label);

// Rows that a GPU cuts into pieces, against the derivative in closed form.
TEST(SwigluWide, AgreesWithTheClosedForm) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const std::int64_t F : {1027, 2056, 5632}) {
      OpExec ex;
      const HostTensor gate_up = random_tensor({2, 2 * F}, dtype, 1, 2.0),
                       dh = random_tensor({2, F}, dtype, 2),
                       weight = random_tensor({2}, DType::kF32, 3, 0.3, 0.5);
      const ConstTensorView weight_R = weight;
      HostTensor h({2, F}, dtype), d({2, 2 * F}, dtype), dweight({2}, DType::kF32);
      const TensorView dweight_R = dweight;
      ops::swiglu_forward(ex, h, gate_up, weight_R);
      ops::swiglu_backward(ex, d, dweight_R, dh, gate_up, weight_R);
      Values expected(d.size()), expected_dweight(2), magnitude(2);
      for (std::size_t i = 0; i < dh.size(); ++i) {
        const std::size_t row = i / static_cast<std::size_t>(F);
        const double g = gate_up.get(2 * i), u = gate_up.get(2 * i + 1), s = 1 / (1 + std::exp(-g)),
                     a = dh.get(i);
        expected[2 * i] = a * weight.get(row) * u * (s + g * s * (1 - s));
        expected[2 * i + 1] = a * weight.get(row) * g * s;
        expected_dweight[row] += a * g * s * u;
        magnitude[row] += std::abs(a * g * s * u);
      }
      expect_close(h.values(), reference_swiglu(gate_up.values(), weight.values(), 2), rounding_of(dtype),
                   "h");
      expect_close(d.values(), expected, rounding_of(dtype), "dgate_up");
      for (std::size_t row = 0; row < 2; ++row)
        EXPECT_NEAR(dweight.get(row), expected_dweight[row], 1e-5 * magnitude[row]);
    }
}

TEST(SwigluEmpty, RowsWithoutNeurons) {
  OpExec ex;
  const HostTensor gate_up({3, 0}, DType::kBF16), dh({3, 0}, DType::kBF16),
      weight = filled({3}, DType::kF32, 1);
  HostTensor h({3, 0}, DType::kBF16), d({3, 0}, DType::kBF16), dweight = filled({3}, DType::kF32, 7);
  const ConstTensorView weight_R = weight;
  const TensorView dweight_R = dweight;
  ops::swiglu_forward(ex, h, gate_up);
  ops::swiglu_backward(ex, d, dweight_R, dh, gate_up, weight_R);
  finish_ops();
  EXPECT_EQ(dweight.values(), Values(3, 0.0));
}

TEST(SwigluExtremes, StaysFinite) {
  OpExec ex;
  const HostTensor gate_up = tensor_of({1, 8}, DType::kF32, {1e4, 2, -1e4, 3, 100, 1, -100, 1});
  HostTensor h({1, 4}, DType::kF32), d({1, 8}, DType::kF32);
  ops::swiglu_forward(ex, h, gate_up);
  expect_close(h.values(), {2e4, 0, 100, 0}, {1e-6, 1e-9}, "h");
  ops::swiglu_backward(ex, d, {}, filled({1, 4}, DType::kF32, 1), gate_up);
  expect_close(d.values(), {2, 1e4, 0, 0, 1, 100, 0, 0}, {1e-6, 1e-9}, "dgate_up");
  ops::geglu_forward(ex, h, gate_up);
  expect_close(h.values(), {2e4, 0, 100, 0}, {1e-6, 1e-9}, "h of gelu");
  ops::geglu_backward(ex, d, {}, filled({1, 4}, DType::kF32, 1), gate_up);
  expect_close(d.values(), {2, 1e4, 0, 0, 1, 100, 0, 0}, {1e-6, 1e-9}, "dgate_up of gelu");
}

class Gate : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().rows, D = GetParam().width;
  const DType dtype = GetParam().dtype;
  HostTensor x{random_tensor({T, D}, dtype, 1)}, w{random_tensor({1, D}, dtype, 2, 0.3)};
  HostTensor dgate{random_tensor({T}, DType::kF32, 3)}, gate{{T}, DType::kF32};
  OpExec ex;
};

TEST_P(Gate, ForwardAndBackward) {
  const Values xv = x.values(), wv = w.values(), dv = dgate.values();
  ops::sigmoid_gate_forward(ex, gate, x, w);
  expect_close(gate.values(), reference_gate(xv, wv), {2e-6, 1e-6}, "gate");
  HostTensor dx = filled({T, D}, dtype, 0.5), dw = filled({1, D}, DType::kF32, 0.25);
  ops::sigmoid_gate_backward(ex, dx, dw, dgate, gate, x, w);
  const Values dx_expected =
      numeric_gradient([&](const Values& v) { return dot(reference_gate(v, wv), dv); }, xv);
  const Values dw_expected =
      numeric_gradient([&](const Values& v) { return dot(reference_gate(xv, v), dv); }, wv);
  expect_close(dx.values(), sum_of(dx_expected, Values(xv.size(), 0.5)), rounding_of(dtype), "dx adds");
  expect_close(dw.values(), sum_of(dw_expected, Values(wv.size(), 0.25)), {1e-5, 1e-5}, "dw adds");
}

TEST_P(Gate, BackwardOverwritesTheWeightsGradient) {
  ops::sigmoid_gate_forward(ex, gate, x, w);
  for (const DType type : {DType::kF32, dtype})
    expect_overwrites({1, D}, type, [&](const GradientView& dw) {
      HostTensor dx = filled({T, D}, dtype, 0.5);
      ops::sigmoid_gate_backward(ex, dx, dw, dgate, gate, x, w);
    });
}

INSTANTIATE_TEST_SUITE_P(Shapes, Gate, testing::ValuesIn(cases()), label);

TEST(ActivationThreads, SameBits) {
  const std::int64_t T = 333, D = 120;
  expect_same_for_any_threads([&] {
    OpExec ex;
    const HostTensor x = random_tensor({T, D}, DType::kF32, 1), w = random_tensor({1, D}, DType::kF32, 2);
    const HostTensor dgate = random_tensor({T}, DType::kF32, 3),
                     dh = random_tensor({T, D / 2}, DType::kF32, 4);
    HostTensor gate({T}, DType::kF32), dx = filled({T, D}, DType::kF32, 0),
                                       dw = filled({1, D}, DType::kF32, 0);
    HostTensor d({T, D}, DType::kF32), dweight({T}, DType::kF32);
    ops::sigmoid_gate_forward(ex, gate, x, w);
    ops::sigmoid_gate_backward(ex, dx, dw, dgate, gate, x, w);
    const ConstTensorView weight_R = gate;
    const TensorView dweight_R = dweight;
    ops::swiglu_backward(ex, d, dweight_R, dh, x, weight_R);
    return std::tuple(gate, dx, dw, d, dweight);
  });
}

TEST(ActivationChecks, RefusesWrongTensors) {
  OpExec ex;
  HostTensor h({4, 8}, DType::kF32), gate_up = filled({4, 16}, DType::kF32, 1),
                                     odd = filled({4, 15}, DType::kF32, 1);
  HostTensor weight = filled({4}, DType::kBF16, 1), dweight({4}, DType::kF32);
  EXPECT_THROW(ops::swiglu_forward(ex, h, odd), Error);
  const ConstTensorView weight_R = weight;
  EXPECT_THROW(ops::swiglu_forward(ex, h, gate_up, weight_R), Error) << "weights are fp32";
  const TensorView dweight_R = dweight;
  EXPECT_THROW(ops::swiglu_backward(ex, gate_up, dweight_R, h, gate_up), Error) << "no weight to derive by";
  HostTensor w_D = filled({8}, DType::kF32, 1);
  EXPECT_THROW(ops::sigmoid_gate_forward(ex, dweight, h, w_D), Error) << "w is [1, D]";
}

TEST(ActivationDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView h = dry_tensor({5, 8}, DType::kBF16), gate_up = dry_tensor({5, 16}, DType::kBF16);
  ops::swiglu_forward(ex, h, gate_up);
  ops::swiglu_backward(ex, gate_up, {}, h, gate_up);
  expect_booked(ex.ledger(), "swiglu_forward", 6 * 40, 160, 80);
  expect_booked(ex.ledger(), "swiglu_backward", 15 * 40, 240, 160);
  ops::geglu_forward(ex, h, gate_up);
  ops::geglu_backward(ex, gate_up, {}, h, gate_up);
  expect_booked(ex.ledger(), "geglu_forward", 10 * 40, 160, 80);
  expect_booked(ex.ledger(), "geglu_backward", 22 * 40, 240, 160);
}

}  // namespace
}  // namespace upmoe::test

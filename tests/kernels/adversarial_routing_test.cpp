// The way of routed rows, from the router's logits to their experts and back, under routings that break
// careless kernels: experts without rows, with one row, with one row more or less than a tile, with all rows.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/routing.h"
#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

constexpr std::int64_t kWidth = 16, kOut = 24;

struct Routing {
  std::string name;
  std::int64_t experts, top_k;
  std::vector<std::int32_t> index_TK;
  std::int64_t tokens() const { return static_cast<std::int64_t>(index_TK.size()) / top_k; }
};

// One choice a token: expert e is the choice of counts[e] tokens, which are dealt in turns.
Routing of_counts(const std::string& name, std::vector<std::int64_t> counts) {
  Routing r{name, static_cast<std::int64_t>(counts.size()), 1, {}};
  for (std::int64_t left = std::accumulate(counts.begin(), counts.end(), std::int64_t{0}); left > 0;)
    for (std::size_t e = 0; e < counts.size(); ++e)
      if (counts[e] > 0) r.index_TK.push_back(static_cast<std::int32_t>(e)), --counts[e], --left;
  return r;
}

std::vector<Routing> routings() {
  std::vector<Routing> all{of_counts("first_takes_all", {300, 0, 0, 0, 0}),
                           of_counts("middle_takes_all", {0, 0, 300, 0, 0}),
                           of_counts("last_takes_all", {0, 0, 0, 0, 300}),
                           of_counts("first_is_empty", {0, 40, 31, 50}),
                           of_counts("middle_is_empty", {40, 31, 0, 50}),
                           of_counts("last_is_empty", {40, 31, 50, 0}),
                           of_counts("one_more_than_tiles", {129, 1, 257, 129}),
                           of_counts("one_less_than_tiles", {127, 255, 127, 383}),
                           of_counts("a_single_token", {0, 0, 1, 0})};
  Routing same{"all_tokens_choose_the_same_four", 60, 4, {}};
  for (int t = 0; t < 200; ++t)
    for (std::int32_t e : {59, 0, 31, 1}) same.index_TK.push_back(e);
  all.push_back(same);
  Routing spread{"sixty_experts", 60, 4, {}};
  for (std::int32_t t = 0; t < 97; ++t)
    for (std::int32_t k = 0; k < 4; ++k) spread.index_TK.push_back((t * 7 + k * 13) % 60);
  all.push_back(spread);
  return all;
}

class AdversarialRouting : public testing::TestWithParam<std::tuple<Routing, DType>> {
 protected:
  const Routing& routing() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  OpExec ex;
};

// out[t] = sum over its choices of W_e x_t, and the gradients of x and W, against the same in double.
TEST_P(AdversarialRouting, RowsGoToTheirExpertsAndBack) {
  const std::int64_t T = routing().tokens(), K = routing().top_k, E = routing().experts, N = T * K;
  const HostTensor index = tensor_of(
      {T, K}, DType::kI32, std::vector<double>(routing().index_TK.begin(), routing().index_TK.end()));
  const HostTensor x = random_tensor({T, kWidth}, dtype(), 1), dout = random_tensor({T, kOut}, dtype(), 2),
                   w = random_tensor({E, kOut, kWidth}, dtype(), 3);
  HostTensor order({N}, DType::kI32), slot({T, K}, DType::kI32), counts({E}, DType::kI32);
  ops::sort_by_expert(ex, order, slot, counts, index);
  const auto values = counts.values();
  const Offsets offsets = offsets_of({values.begin(), values.end()});
  ASSERT_EQ(offsets.back(), N);

  HostTensor rows({N, kWidth}, dtype()), y({N, kOut}, dtype()), out({T, kOut}, dtype());
  HostTensor dy({N, kOut}, dtype()), drows({N, kWidth}, dtype()), dx({T, kWidth}, dtype()),
      dw = filled({E, kOut, kWidth}, DType::kF32, 0);
  ops::gather_rows(ex, rows, x, order, K);
  ops::grouped_gemm_forward(ex, y, rows, w, offsets);
  ops::gather_sum_rows(ex, out, y, slot);
  ops::gather_rows(ex, dy, dout, order, K);
  ops::grouped_gemm_dgrad(ex, drows, dy, w, offsets);
  ops::grouped_gemm_wgrad(ex, dw, dy, rows, offsets, Accumulate::kAdd);
  ops::gather_sum_rows(ex, dx, drows, slot);

  std::vector<double> expected_out(out.size()), expected_dx(dx.size()), expected_dw(dw.size());
  const auto xs = x.values(), gs = dout.values(), ws = w.values();
  for (std::size_t c = 0; c < routing().index_TK.size(); ++c) {
    const std::size_t t = c / static_cast<std::size_t>(K),
                      e = static_cast<std::size_t>(routing().index_TK[c]);
    for (std::size_t n = 0; n < kOut; ++n)
      for (std::size_t d = 0; d < kWidth; ++d) {
        const std::size_t weight = (e * kOut + n) * kWidth + d;
        expected_out[t * kOut + n] += ws[weight] * xs[t * kWidth + d];
        expected_dx[t * kWidth + d] += ws[weight] * gs[t * kOut + n];
        expected_dw[weight] += gs[t * kOut + n] * xs[t * kWidth + d];
      }
  }
  // Rows are rounded to bf16 before they are added up: up to four, each by 2^-9 of itself, and then their
  // sum, which may be much smaller than they are.
  const Tolerance rounded = dtype() == DType::kBF16 ? Tolerance{1.0 / 64, 4e-3} : rounding_of(dtype());
  expect_close(out.values(), expected_out, rounded, "out");
  expect_close(dx.values(), expected_dx, rounded, "dx");
  expect_close(dw.values(), expected_dw, {1e-5, 2e-6}, "dw");
  EXPECT_EQ(ex.scratch_used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Routings, AdversarialRouting,
                         testing::Combine(testing::ValuesIn(routings()),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& i) {
                           return std::get<0>(i.param).name + "_" + dtype_label(std::get<1>(i.param));
                         });

// Ties everywhere: every token chooses the lowest experts, in order, and their gradients agree.
TEST(AdversarialRouter, TiesEverywhere) {
  OpExec ex;
  for (const std::int64_t E : {4, 60, 130}) {
    const std::int64_t T = 70, K = 4;
    const HostTensor logits = filled({T, E}, DType::kF32, 0.25), dweight = filled({T, K}, DType::kF32, 1),
                     aux = filled({E}, DType::kF32, 0);
    HostTensor probs({T, E}, DType::kF32), index({T, K}, DType::kI32), weight({T, K}, DType::kF32),
        lse({T}, DType::kF32), dlogits({T, E}, DType::kF32);
    ops::route_tokens(ex, probs, index, weight, lse, logits, false);
    ops::route_tokens_backward(ex, dlogits, dweight, {aux}, {probs, index, weight, lse}, false);
    const double p = 1.0 / static_cast<double>(E), chosen = p * (1 - 4 * p), other = -4 * p * p;
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e) {
        if (e < K) {
          ASSERT_EQ(index.get(static_cast<std::size_t>(t * K + e)), e) << "token " << t;
        }
        ASSERT_NEAR(dlogits.get(static_cast<std::size_t>(t * E + e)), e < K ? chosen : other, 1e-7);
      }
  }
}

}  // namespace
}  // namespace upmoe::test

#include "kernels/ops/grouped_gemm.h"

#include <gtest/gtest.h>

#include <tuple>

#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Problem {
  std::vector<std::int64_t> counts;
  std::int64_t n, k;
  DType in, out;

  Offsets offsets = offsets_of(counts);
  std::int64_t experts = static_cast<std::int64_t>(counts.size()), rows = offsets.back();
  HostTensor x{random_tensor({rows, k}, in, 1)}, w{random_tensor({experts, n, k}, in, 2)},
      dy{random_tensor({rows, n}, in, 3)};
  HostTensor y{filled({rows, n}, out, NAN)}, dx{filled({rows, k}, out, NAN)};  // to be overwritten
  HostTensor dw{random_tensor({experts, n, k}, out, 4)};

  std::string name() const {
    return fmt::format("{} experts, {} rows, {} x {} {} -> {}", experts, rows, n, k, name_of(in),
                       name_of(out));
  }
  void run(Exec& ex, Accumulate mode) {
    ops::grouped_gemm_forward(ex, y, x, w, offsets);
    ops::grouped_gemm_dgrad(ex, dx, dy, w, offsets);
    ops::grouped_gemm_wgrad(ex, dw, dy, x, offsets, mode);
  }
  // One expert of this problem as a problem of its own.
  Problem alone(std::int64_t i) const {
    const auto e = static_cast<std::size_t>(i);
    Problem one{{counts[e]}, n, k, in, out};
    const auto copy = [&](HostTensor& to, const HostTensor& from, std::int64_t begin, std::int64_t end) {
      const ConstTensorView piece = from.on_host().rows(begin, end);
      if (piece.bytes() > 0) std::memcpy(to.host_view().data, piece.data, piece.bytes());
    };
    copy(one.x, x, offsets[e], offsets[e + 1]);
    copy(one.dy, dy, offsets[e], offsets[e + 1]);
    copy(one.w, w, i, i + 1);
    copy(one.dw, dw, i, i + 1);
    return one;
  }
};

std::vector<double> part(const std::vector<double>& all, std::int64_t begin, std::int64_t end) {
  return {all.begin() + begin, all.begin() + end};
}

void expect_right(const Problem& p, const std::vector<double>& dw_before, const std::string& what) {
  const auto x = p.x.values(), w = p.w.values(), dy = p.dy.values();
  const auto y = p.y.values(), dx = p.dx.values(), dw = p.dw.values();
  for (std::int64_t i = 0; i < p.experts; ++i) {
    const std::int64_t begin = p.offsets[static_cast<std::size_t>(i)],
                       end = p.offsets[static_cast<std::size_t>(i) + 1];
    const std::int64_t weight = i * p.n * p.k;
    const double *x_i = x.data() + begin * p.k, *dy_i = dy.data() + begin * p.n, *w_i = w.data() + weight;
    const std::string name = fmt::format("{} {}: expert {}", what, p.name(), i);
    expect_sums(part(y, begin * p.n, end * p.n),
                reference_gemm({end - begin, p.n, p.k, Transpose::kNo, Transpose::kYes}, x_i, w_i), p.out,
                name + " y");
    expect_sums(part(dx, begin * p.k, end * p.k), reference_gemm({end - begin, p.k, p.n}, dy_i, w_i), p.out,
                name + " dx");
    const auto before = dw_before.empty() ? dw_before : part(dw_before, weight, weight + p.n * p.k);
    expect_sums(part(dw, weight, weight + p.n * p.k),
                reference_gemm({p.n, p.k, end - begin, Transpose::kYes, Transpose::kNo}, dy_i, x_i, before),
                p.out, name + " dw");
  }
}

class GroupedGemm : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  Problem problem(std::vector<std::int64_t> counts, std::int64_t n, std::int64_t k) const {
    return {std::move(counts), n, k, std::get<0>(GetParam()), std::get<1>(GetParam())};
  }
  OpExec ex;
};

TEST_P(GroupedGemm, MatchesTheReference) {
  // The last two are cut into several tasks per expert: rows beyond one task, columns beyond the cache, and a
  // depth of odd length in each of the three products.
  for (Problem p : {problem({1}, 1, 1), problem({3, 0, 7, 1}, 5, 3), problem({0, 0}, 4, 6),
                    problem({17, 48, 6, 0, 53}, 65, 33), problem({13, 5, 30}, 352, 256),
                    problem({601, 0, 7}, 30, 75), problem({7}, 150, 2101)}) {
    const auto before = p.dw.values();
    p.run(ex, Accumulate::kAdd);
    expect_right(p, before, "added");
    p.run(ex, Accumulate::kOverwrite);
    expect_right(p, {}, "overwritten");
  }
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST_P(GroupedGemm, AcceptsEmptyDims) {
  for (Problem p : {problem({}, 4, 3), problem({2, 3}, 0, 3), problem({2, 3}, 4, 0), problem({0}, 4, 3)}) {
    const auto before = p.dw.values();
    p.run(ex, Accumulate::kAdd);
    expect_right(p, before, "empty");
    p.run(ex, Accumulate::kOverwrite);
    expect_right(p, {}, "empty");
  }
}

TEST_P(GroupedGemm, LeavesTheGradientOfAnExpertWithoutRowsAlone) {
  Problem p = problem({0, 2}, 4, 3);
  p.dw.set(0, -0.0);  // adding 0 would turn it into +0
  ops::grouped_gemm_wgrad(ex, p.dw, p.dy, p.x, p.offsets, Accumulate::kAdd);
  EXPECT_TRUE(std::signbit(p.dw.get(0)));
}

// What makes training independent of the number of ranks that share the experts.
TEST_P(GroupedGemm, AnExpertDoesNotDependOnTheOthers) {
  std::vector<std::int64_t> counts;
  for (std::int64_t i = 0; i < 60; ++i) counts.push_back(i * 37 % 61);
  Problem all = problem(counts, 88, 97);
  const Problem fresh = all;
  all.run(ex, Accumulate::kAdd);
  for (std::int64_t i = 0; i < all.experts; ++i) {
    Problem one = fresh.alone(i);
    one.run(ex, Accumulate::kAdd);
    const Problem expected = all.alone(i);  // copies inputs and dw; y and dx are compared by value
    EXPECT_TRUE(one.dw == expected.dw) << i;
    const std::int64_t begin = all.offsets[static_cast<std::size_t>(i)],
                       end = all.offsets[static_cast<std::size_t>(i) + 1];
    EXPECT_EQ(one.y.values(), part(all.y.values(), begin * all.n, end * all.n)) << i;
    EXPECT_EQ(one.dx.values(), part(all.dx.values(), begin * all.k, end * all.k)) << i;
  }
}

// To the bit on the CPU; on a GPU other numbers of rows may have another algorithm.
TEST_P(GroupedGemm, ARowDoesNotDependOnTheOtherRows) {
  Problem p = problem({101}, 70, 45);
  p.run(ex, Accumulate::kOverwrite);
  for (std::int64_t rows : {1, 5, 6, 49}) {
    HostTensor y({rows, p.n}, p.out);
    const Offsets offsets{0, rows};
    ops::grouped_gemm_forward(ex, y, ConstTensorView(p.x).rows(0, rows), p.w, offsets);
    const Tolerance same = on_gpu() ? rounding_of(p.out) : Tolerance{0, 0};
    expect_close(y.values(), part(p.y.values(), 0, rows * p.n), same, fmt::format("{} rows", rows));
  }
}

TEST_P(GroupedGemm, IsTheSameForAnyNumberOfThreads) {
  for (const Problem& fresh : {problem({100, 0, 3, 40, 500}, 130, 70), problem({90}, 256, 200)})
    expect_same_for_any_threads([&] {
      Problem p = fresh;
      p.run(ex, Accumulate::kAdd);
      return std::tuple(p.y, p.dx, p.dw);
    });
}

// As GemmRounding: the sum over the rows of both products is 1 + 2^-9.
TEST(GroupedGemmRounding, AddsToBf16WithOneRounding) {
  OpExec ex;
  const HostTensor dy = filled({2, 1}, DType::kBF16, 1),
                   x = tensor_of({2, 1}, DType::kBF16, {1, std::ldexp(1.0, -9)});
  HostTensor dw = filled({1, 1, 1}, DType::kBF16, 256);
  ops::grouped_gemm_wgrad(ex, dw, dy, x, Offsets{0, 2}, Accumulate::kAdd);
  EXPECT_EQ(dw.get(0), 258);
}

INSTANTIATE_TEST_SUITE_P(Types, GroupedGemm,
                         testing::Values(std::tuple{DType::kF32, DType::kF32},
                                         std::tuple{DType::kBF16, DType::kBF16},
                                         std::tuple{DType::kBF16, DType::kF32}),
                         [](const auto& types) {
                           return dtype_label(std::get<0>(types.param)) + "_to_" +
                                  dtype_label(std::get<1>(types.param));
                         });

TEST(GroupedGemmChecks, RejectWhatDoesNotFit) {
  OpExec ex;
  const Problem p{{2, 3}, 4, 6, DType::kF32, DType::kF32};
  const auto forward = [&](HostTensor y, const HostTensor& x, const HostTensor& w, const Offsets& offsets) {
    ops::grouped_gemm_forward(ex, y, x, w, offsets);
  };
  EXPECT_NO_THROW(forward(p.y, p.x, p.w, p.offsets));
  EXPECT_THROW(forward(p.y, p.x, p.w, {0, 2}), Error);
  EXPECT_THROW(forward(p.y, p.x, p.w, {}), Error);
  EXPECT_THROW(forward(p.y, p.x, p.w, {0, 2, 4}), Error);
  EXPECT_THROW(forward(p.y, p.x, p.w, {1, 2, 5}), Error);
  EXPECT_THROW(forward(p.y, p.x, p.w, {0, 6, 5}), Error);
  EXPECT_THROW(forward(p.dx, p.x, p.w, p.offsets), Error);
  EXPECT_THROW(forward(p.y, p.dy, p.w, p.offsets), Error);
  EXPECT_THROW(forward(p.y, p.x, p.x, p.offsets), Error);
  EXPECT_THROW(forward(p.y, p.x, HostTensor({2, 4, 6}, DType::kBF16), p.offsets), Error);
  EXPECT_THROW(forward(HostTensor({5, 4}, DType::kBF16), p.x, p.w, p.offsets), Error);
  HostTensor dx = p.dx, dw = p.dw;
  EXPECT_NO_THROW(ops::grouped_gemm_dgrad(ex, dx, p.dy, p.w, p.offsets));
  EXPECT_THROW(ops::grouped_gemm_dgrad(ex, dx, p.x, p.w, p.offsets), Error);
  EXPECT_NO_THROW(ops::grouped_gemm_wgrad(ex, dw, p.dy, p.x, p.offsets, Accumulate::kAdd));
  EXPECT_THROW(ops::grouped_gemm_wgrad(ex, dw, p.x, p.dy, p.offsets, Accumulate::kAdd), Error);
}

// Without the host's copy the CPU reads the tensor, and a GPU's is fetched: the same results.
TEST_P(GroupedGemm, TheOffsetsOnTheDeviceAreEnough) {
  Problem p = problem({3, 0, 7, 1}, 5, 3), device = p;
  p.run(ex, Accumulate::kOverwrite);
  const ExpertRows rows = device.offsets.on_device();
  ops::grouped_gemm_forward(ex, device.y, device.x, device.w, rows);
  ops::grouped_gemm_dgrad(ex, device.dx, device.dy, device.w, rows);
  ops::grouped_gemm_wgrad(ex, device.dw, device.dy, device.x, rows, Accumulate::kOverwrite);
  EXPECT_EQ(std::tuple(device.y, device.dx, device.dw), std::tuple(p.y, p.dx, p.dw));
}

TEST(GroupedGemmChecks, RejectOffsetsOnTheDeviceThatDoNotFit) {
  OpExec ex;
  const Problem p{{2, 3}, 4, 6, DType::kF32, DType::kF32};
  HostTensor y = p.y;
  const auto forward = [&](const ExpertRows& rows) { ops::grouped_gemm_forward(ex, y, p.x, p.w, rows); };
  for (const Offsets& wrong : {Offsets{0, 2, 4}, Offsets{1, 2, 5}, Offsets{0, 6, 5}})
    EXPECT_THROW(forward(wrong.on_device()), Error);
  EXPECT_THROW(forward(Offsets{0, 5}.on_device()), Error);
  if (on_gpu()) return;  // nobody compares there
  const Offsets other{0, 1, 5};
  EXPECT_THROW(forward({ExpertRows(other).offset_e1, ExpertRows(p.offsets).on_host}), Error);
}

TEST(GroupedGemmLedger, BooksOnTheDryDevice) {
  OpExec dry(DeviceType::kDry);
  const TensorView x = dry_tensor({5, 6}, DType::kBF16), y = dry_tensor({5, 4}, DType::kBF16);
  const TensorView w = dry_tensor({3, 4, 6}, DType::kBF16), dw = dry_tensor({3, 4, 6}, DType::kF32);
  const std::vector<std::int64_t> offsets{0, 2, 2, 5};  // the expert in the middle is not touched
  const ExpertRows rows{dry_tensor({4}, DType::kI32), offsets};
  ops::grouped_gemm_forward(dry, y, x, w, rows);
  ops::grouped_gemm_dgrad(dry, x, y, w, rows);
  ops::grouped_gemm_wgrad(dry, dw, y, x, rows, Accumulate::kAdd);
  const double flops = 2.0 * 5 * 4 * 6;
  expect_booked(dry.ledger(), "grouped_gemm_forward", flops, 30 * 2 + 48 * 2, 20 * 2);
  expect_booked(dry.ledger(), "grouped_gemm_dgrad", flops, 20 * 2 + 48 * 2, 30 * 2);
  expect_booked(dry.ledger(), "grouped_gemm_wgrad", flops, 20 * 2 + 30 * 2 + 48 * 4, 48 * 4);
  OpExec unknown(DeviceType::kDry);  // all experts may have rows
  ops::grouped_gemm_forward(unknown, y, x, w, {rows.offset_e1, {}});
  expect_booked(unknown.ledger(), "grouped_gemm_forward", flops, 30 * 2 + 72 * 2, 20 * 2);
}

}  // namespace
}  // namespace upmoe::test

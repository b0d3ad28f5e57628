#include "kernels/ops/gemm.h"

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <thread>
#include <vector>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"

namespace upmoe::test {
namespace {

constexpr std::array kTransposes = {Transpose::kNo, Transpose::kYes};

struct Types {
  DType in, out;
};
constexpr std::array kTypes = {Types{DType::kF32, DType::kF32}, Types{DType::kBF16, DType::kBF16},
                               Types{DType::kBF16, DType::kF32}};

struct Case {
  MatrixProduct p;
  Types types;
  HostTensor a, b, c;

  Case(MatrixProduct product, Types t)
      : p(product),
        types(t),
        a(random_tensor(product.transpose_a == Transpose::kNo ? Shape{p.m, p.k} : Shape{p.k, p.m}, t.in, 1)),
        b(random_tensor(product.transpose_b == Transpose::kNo ? Shape{p.k, p.n} : Shape{p.n, p.k}, t.in, 2)),
        c(random_tensor({p.m, p.n}, t.out, 3)) {}

  std::string name() const {
    return fmt::format("{}x{}x{} {} -> {} transpose {} {}", p.m, p.n, p.k, name_of(types.in),
                       name_of(types.out), p.transpose_a == Transpose::kYes,
                       p.transpose_b == Transpose::kYes);
  }
  void run(Exec& ex, Accumulate mode, ConstTensorView bias = {}) {
    ops::gemm(ex, c, {a, p.transpose_a}, {b, p.transpose_b}, mode, bias);
  }
};

class Gemm : public testing::TestWithParam<std::array<std::int64_t, 3>> {
 protected:
  template <class Body>
  void for_cases(const Body& body) {
    const auto [m, n, k] = GetParam();
    for (Types types : kTypes)
      for (Transpose ta : kTransposes)
        for (Transpose tb : kTransposes) {
          Case test({m, n, k, ta, tb}, types);
          body(test);
        }
  }
  OpExec ex;
};

TEST_P(Gemm, OverwritesOrAdds) {
  for_cases([&](Case& test) {
    const auto a = test.a.values(), b = test.b.values(), before = test.c.values();
    test.run(ex, Accumulate::kAdd);
    expect_sums(test.c.values(), reference_gemm(test.p, a.data(), b.data(), before), test.types.out,
                test.name() + " added");
    test.run(ex, Accumulate::kOverwrite);
    expect_sums(test.c.values(), reference_gemm(test.p, a.data(), b.data()), test.types.out, test.name());
  });
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST_P(Gemm, AddsTheBias) {
  for_cases([&](Case& test) {
    const HostTensor bias = random_tensor({test.p.n}, test.types.in, 4);
    std::vector<double> rows;
    for (std::int64_t i = 0; i < test.p.m; ++i)
      for (double x : bias.values()) rows.push_back(x);
    const ConstTensorView bias_N = bias;
    test.run(ex, Accumulate::kOverwrite, bias_N);
    const auto a = test.a.values(), b = test.b.values();
    expect_sums(test.c.values(), reference_gemm(test.p, a.data(), b.data(), rows), test.types.out,
                test.name());
  });
}

TEST_P(Gemm, RepeatsBitwise) {
  for_cases([&](Case& test) {
    test.run(ex, Accumulate::kOverwrite);
    const HostTensor first = test.c;
    test.run(ex, Accumulate::kOverwrite);
    EXPECT_TRUE(test.c == first) << test.name();
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Gemm,
    testing::Values(std::array<std::int64_t, 3>{1, 1, 1}, std::array<std::int64_t, 3>{5, 3, 7},
                    std::array<std::int64_t, 3>{17, 33, 65}, std::array<std::int64_t, 3>{64, 64, 64},
                    std::array<std::int64_t, 3>{40, 60, 256}, std::array<std::int64_t, 3>{130, 48, 31},
                    std::array<std::int64_t, 3>{1, 100, 9}, std::array<std::int64_t, 3>{0, 4, 5},
                    std::array<std::int64_t, 3>{3, 0, 5}, std::array<std::int64_t, 3>{4, 5, 0}));

// 256 + (1 + 2^-9) lies above the middle of the bf16 neighbours 256 and 258. Rounding the product to 1 first
// would give the middle, and 256.
TEST(GemmRounding, AddsToBf16WithOneRounding) {
  OpExec ex;
  HostTensor a = tensor_of({1, 2}, DType::kBF16, {1, std::ldexp(1.0, -9)});
  HostTensor b = filled({2, 1}, DType::kBF16, 1), c = filled({1, 1}, DType::kBF16, 256);
  ops::gemm(ex, c, {a}, {b}, Accumulate::kAdd);
  EXPECT_EQ(c.get(0), 258);
}

// Each rank with a stream of its own, as ranks have them; the tests' tensors come and go on another one.
TEST(GemmThreads, RanksAsThreadsShareNothing) {
  struct Rank {
    Case test;
    OpExec ex;
    std::unique_ptr<Stream> stream;
    explicit Rank(DType dtype) : test({33, 47, 65, Transpose::kNo, Transpose::kYes}, {dtype, DType::kF32}) {
      if (on_gpu()) stream = gpu::make_stream();
      static_cast<Exec&>(ex).stream = stream.get();
      test.c.view(), static_cast<void>(ConstTensorView(test.a)), static_cast<void>(ConstTensorView(test.b));
    }
    void work() {
      if (on_gpu()) gpu::use(0);
      for (int i = 0; i < 20; ++i) test.run(ex, Accumulate::kAdd);
      if (stream != nullptr) stream->synchronize();
    }
  };
  Rank expected_f32(DType::kF32), expected_bf16(DType::kBF16);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < 4; ++r)
    ranks.push_back(std::make_unique<Rank>(r % 2 == 0 ? DType::kF32 : DType::kBF16));
  finish_ops();
  expected_f32.work();
  expected_bf16.work();
  std::vector<std::thread> threads;
  for (const auto& rank : ranks) threads.emplace_back([&rank] { rank->work(); });
  for (std::thread& t : threads) t.join();
  for (std::size_t r = 0; r < ranks.size(); ++r)
    EXPECT_TRUE(ranks[r]->test.c == (r % 2 == 0 ? expected_f32 : expected_bf16).test.c) << "rank " << r;
}

TEST(GemmChecks, RejectWhatDoesNotFit) {
  OpExec ex;
  HostTensor a({4, 6}, DType::kF32), b({6, 5}, DType::kF32), c({4, 5}, DType::kF32);
  HostTensor narrow_b({6, 5}, DType::kBF16), narrow_c({4, 5}, DType::kBF16), wrong_c({5, 4}, DType::kF32);
  HostTensor bias({5}, DType::kF32), wrong_bias({4}, DType::kF32);
  const ConstTensorView bias_N = bias, wrong_N = wrong_bias;
  const auto run = [&](TensorView out, const HostTensor& x, Transpose tx, const HostTensor& y, Transpose ty,
                       Accumulate mode, ConstTensorView n) {
    ops::gemm(ex, out, {x, tx}, {y, ty}, mode, n);
  };
  const auto no = Transpose::kNo, yes = Transpose::kYes;
  const auto overwrite = Accumulate::kOverwrite, add = Accumulate::kAdd;
  EXPECT_NO_THROW(run(c, a, no, b, no, overwrite, bias_N));
  EXPECT_THROW(run(c, a, yes, b, no, overwrite, {}), Error);
  EXPECT_THROW(run(c, a, no, b, yes, overwrite, {}), Error);
  EXPECT_THROW(run(wrong_c, a, no, b, no, overwrite, {}), Error);
  EXPECT_THROW(run(c, a, no, narrow_b, no, overwrite, {}), Error);
  EXPECT_THROW(run(narrow_c, a, no, b, no, overwrite, {}), Error);
  EXPECT_THROW(run(c, a, no, b, no, overwrite, wrong_N), Error);
  EXPECT_THROW(run(c, a, no, b, no, add, bias_N), Error);
  HostTensor rank3({4, 6, 1}, DType::kF32), integers({4, 6}, DType::kI32);
  EXPECT_THROW(run(c, rank3, no, b, no, overwrite, {}), Error);
  EXPECT_THROW(run(c, integers, no, b, no, overwrite, {}), Error);
  EXPECT_THROW(ops::gemm(ex, dry_tensor({4, 5}, DType::kF32), {a, no}, {b, no}, overwrite), Error);
}

TEST(GemmLedger, BooksOnTheDryDeviceAsOnTheCpu) {
  OpExec dry(DeviceType::kDry);
  ops::gemm(dry, dry_tensor({4, 5}, DType::kF32), {dry_tensor({4, 6}, DType::kBF16)},
            {dry_tensor({5, 6}, DType::kBF16), Transpose::kYes}, Accumulate::kAdd);
  expect_booked(dry.ledger(), "gemm", 2.0 * 4 * 5 * 6, 24 * 2 + 30 * 2 + 20 * 4, 20 * 4);
  ops::bias_backward(dry, dry_tensor({6}, DType::kF32), dry_tensor({4, 6}, DType::kBF16));
  expect_booked(dry.ledger(), "bias_backward", 24, 24 * 2 + 6 * 4, 6 * 4);
  OpExec cpu;
  Case test({4, 5, 6, Transpose::kNo, Transpose::kYes}, {DType::kBF16, DType::kF32});
  test.run(cpu, Accumulate::kAdd);
  expect_booked(cpu.ledger(), "gemm", 2.0 * 4 * 5 * 6, 24 * 2 + 30 * 2 + 20 * 4, 20 * 4);
}

TEST(BiasBackward, SumsTheRows) {
  for (Types types : kTypes)
    for (std::int64_t rows : {0, 1, 31, 33, 200})
      for (std::int64_t width : {1, 16, 37}) {
        OpExec ex;
        const HostTensor dy = random_tensor({rows, width}, types.in, 1);
        HostTensor db = random_tensor({width}, types.out, 2);
        const std::vector<double> ones(static_cast<std::size_t>(rows), 1.0), before = db.values();
        ops::bias_backward(ex, db, dy);
        expect_sums(db.values(), reference_gemm({1, width, rows}, ones.data(), dy.values().data(), before),
                    types.out, fmt::format("{} x {} {}", rows, width, name_of(types.in)));
      }
}

TEST(BiasBackward, Overwrites) {
  for (Types types : kTypes)
    for (std::int64_t rows : {0, 1, 33, 600}) {
      OpExec ex;
      const HostTensor dy = random_tensor({rows, 37}, types.in, 1);
      expect_overwrites({37}, types.out, [&](const GradientView& db) { ops::bias_backward(ex, db, dy); });
    }
}

TEST(BiasBackward, IsTheSameForAnyNumberOfThreads) {
  const HostTensor dy = random_tensor({500, 70}, DType::kF32, 1);
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor db = filled({70}, DType::kF32, 0);
    ops::bias_backward(ex, db, dy);
    return db;
  });
}

TEST(BiasBackward, RejectsWhatDoesNotFit) {
  OpExec ex;
  HostTensor dy({4, 6}, DType::kF32), db({6}, DType::kF32), short_db({4}, DType::kF32),
      narrow_db({6}, DType::kBF16);
  EXPECT_NO_THROW(ops::bias_backward(ex, db, dy));
  EXPECT_THROW(ops::bias_backward(ex, short_db, dy), Error);
  EXPECT_THROW(ops::bias_backward(ex, narrow_db, dy), Error);
  EXPECT_THROW(ops::bias_backward(ex, db, db), Error);
}

}  // namespace
}  // namespace upmoe::test

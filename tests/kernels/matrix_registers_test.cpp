// Products in matrix registers, by plain loops in their place, so on every processor whose units are pairs of bf16; and
// that those loops are what the registers do, where there are some.

#include "kernels/cpu/matrix_registers.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/packed_products.h"
#include "tests/support/op_exec.h"
#include "tests/support/plain_matrices.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"

namespace upmoe::test {
namespace {

#ifdef __AVX512BF16__

using Words = std::array<std::uint32_t, cpu::kMatrixUnits>;

template <class Registers>
Words multiplied(const Words& a, const Words& b, Words sum) {
  const typename Registers::Use use{};
  Registers::template load<3>(sum.data(), 64);
  Registers::template load<5>(a.data(), 64);
  Registers::template load<7>(b.data(), 64);
  Registers::template multiply_add<3, 5, 7>();
  Registers::template multiply_add<3, 5, 7>();
  Registers::template store<3>(sum.data(), 64);
  return sum;
}

// Numbers of all sizes, subnormal ones among them, with sums that cancel.
TEST(MatrixRegisters, DoWhatThePlainLoopsDo) {
#ifdef UPMOE_MATRIX_REGISTERS
  if (!cpu::has_matrix_registers()) GTEST_SKIP() << "none here";
  std::mt19937 random(7);
  for (const int spread : {0, 8, 60, 126}) {
    const auto number = [&] {
      const int exponent = spread == 126 ? -126 : std::uniform_int_distribution<int>(-spread, spread)(random);
      return std::ldexp(std::uniform_real_distribution<float>(-2, 2)(random), exponent);
    };
    Words a, b, sum;
    for (std::size_t i = 0; i < a.size(); ++i) {
      const auto pair = [&] { return std::uint32_t{to_bf16(number()).bits} << 16 | to_bf16(number()).bits; };
      a[i] = pair();
      b[i] = pair();
      sum[i] = std::bit_cast<std::uint32_t>(number());
    }
    EXPECT_EQ(multiplied<cpu::MatrixRegisters>(a, b, sum), multiplied<PlainMatrices>(a, b, sum)) << spread;
  }
#else
  GTEST_SKIP() << "compiled without them";
#endif
}

using Plain = cpu::InMatrices<PlainMatrices>;

struct Kind {
  DType out;
  bool a_by_depth, b_by_depth;
  Accumulate mode;
  bool bias;
};

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  for (const DType out : {DType::kBF16, DType::kF32})
    for (const bool a : {false, true})
      for (const bool b : {false, true}) {
        all.push_back({out, a, b, Accumulate::kOverwrite, false});
        all.push_back({out, a, b, Accumulate::kOverwrite, true});
        all.push_back({out, a, b, Accumulate::kAdd, false});
      }
  return all;
}

template <class Out>
void expect_product(const std::array<std::int64_t, 3>& mnk, const Kind& kind) {
  const auto [m, n, k] = mnk;
  const MatrixProduct shape{m, n, k, kind.a_by_depth ? Transpose::kYes : Transpose::kNo,
                            kind.b_by_depth ? Transpose::kNo : Transpose::kYes};
  const std::string name =
      fmt::format("{}x{}x{} {} by depth {} {} add {} bias {}", m, n, k, name_of(kind.out), kind.a_by_depth,
                  kind.b_by_depth, kind.mode == Accumulate::kAdd, kind.bias);
  const HostTensor a = random_tensor({m * k}, DType::kBF16, 1), b = random_tensor({n * k}, DType::kBF16, 2),
                   bias = random_tensor({n}, DType::kBF16, 3);
  // A row before and a row behind, which nobody may touch.
  HostTensor c = random_tensor({m + 2, n}, kind.out, 4);
  const std::vector<double> before = c.values(), biases = bias.values();
  OpExec op;
  op.spoil_scratch();
  Exec& ex = op;
  cpu::multiply_products_in<Plain>(ex, 1, [&](std::int64_t) {
    return cpu::PackedProduct<bf16, Out>{c.host_view().as<Out>() + n,
                                         {a.on_host().as<bf16>(), kind.a_by_depth ? m : k, kind.a_by_depth},
                                         {b.on_host().as<bf16>(), kind.b_by_depth ? n : k, kind.b_by_depth},
                                         m,
                                         n,
                                         k,
                                         kind.mode,
                                         kind.bias ? bias.on_host().as<bf16>() : nullptr};
  });
  std::vector<double> added;
  for (std::int64_t i = 0; i < m * n; ++i) {
    if (kind.mode == Accumulate::kAdd) added.push_back(before[static_cast<std::size_t>(n + i)]);
    if (kind.bias) added.push_back(biases[static_cast<std::size_t>(i % n)]);
  }
  const auto x = a.values(), y = b.values(), all = c.values();
  const auto row = [&](const std::vector<double>& of, std::int64_t first, std::int64_t last) {
    return std::vector<double>(of.begin() + first * n, of.begin() + last * n);
  };
  expect_sums(row(all, 1, m + 1), reference_gemm(shape, x.data(), y.data(), added), kind.out, name);
  EXPECT_EQ(row(all, 0, 1), row(before, 0, 1)) << name;
  EXPECT_EQ(row(all, m + 1, m + 2), row(before, m + 1, m + 2)) << name;
}

// One register or less; several, and one more or less than whole ones; more rows than a block; panels of one to four
// registers; a depth of one step, of an odd number, of a few and one; few rows of many columns, which are turned.
constexpr std::array<std::int64_t, 3> kShapes[] = {{1, 1, 1},    {3, 5, 2},     {16, 16, 32}, {17, 33, 31},
                                                   {32, 64, 64}, {33, 65, 33},  {48, 50, 96}, {130, 70, 65},
                                                   {5, 90, 520}, {40, 170, 37}, {7, 20, 1},   {300, 20, 40}};

TEST(MatrixRegisters, ComputeProductsOfEveryKind) {
  for (const Kind& kind : kinds())
    for (const auto& shape : kShapes)
      kind.out == DType::kBF16 ? expect_product<bf16>(shape, kind) : expect_product<float>(shape, kind);
}

// As the rows of different experts are, each of them alone; and the same bits for any number of threads.
TEST(MatrixRegisters, SumsDependOnTheirRowAndColumnAlone) {
  const std::int64_t n = 200, k = 530;
  const HostTensor x = random_tensor({150, k}, DType::kBF16, 1), w = random_tensor({n, k}, DType::kBF16, 2);
  const auto product = [&](std::int64_t first, std::int64_t last) {
    HostTensor y({last - first, n}, DType::kF32);
    OpExec op;
    Exec& ex = op;
    cpu::multiply_products_in<Plain>(ex, 1, [&](std::int64_t) {
      return cpu::PackedProduct<bf16, float>{y.host_view().as<float>(),
                                             {x.on_host().as<bf16>() + first * k, k, false},
                                             {w.on_host().as<bf16>(), k, false},
                                             last - first,
                                             n,
                                             k,
                                             Accumulate::kOverwrite};
    });
    return y;
  };
  expect_same_for_any_threads([&] { return product(0, 150); });
  const auto all = product(0, 150).values();
  for (const auto& [first, last] : {std::pair{0, 1}, {149, 150}, {20, 37}, {0, 120}}) {
    const auto some = product(first, last).values();
    EXPECT_EQ(some, std::vector<double>(all.begin() + first * n, all.begin() + last * n))
        << first << ", " << last;
  }
}

// --- attention's blocks ---

struct BlockCase {
  std::int64_t rows, columns, depth;  // depth in elements
  cpu::Causal causal;
};

template <bool kTransposeA, bool kAdd, cpu::Causal kCausal>
void expect_block(std::int64_t rows, std::int64_t columns, std::int64_t depth) {
  using U = std::uint32_t;
  constexpr std::int64_t kBlock = cpu::kBlock,
                         kUnits = 64;  // rows of b, and units of a row of a, that there are
  const std::int64_t units = (depth + 1) / 2, lda = kTransposeA ? kBlock : kUnits;
  std::mt19937 random(static_cast<unsigned>(rows * 64 + columns + depth));
  std::uniform_real_distribution<float> number(-1, 1);
  const auto bits = [](float x) { return std::uint32_t{to_bf16(x).bits}; };
  std::vector<float> a(static_cast<std::size_t>(rows * depth)), b(static_cast<std::size_t>(depth * columns));
  const auto at = [](auto& v, std::int64_t i) -> auto& {
    return v[static_cast<std::size_t>(i)];
  };
  // Behind the last row, and the last pair of a transposed factor, anything; behind the depth zeros.
  std::vector<U> a_units(static_cast<std::size_t>(kBlock * kUnits), 0x7fc07fc0u),
      b_units(static_cast<std::size_t>(kUnits * columns));
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t u = 0; u < (kTransposeA ? units : kUnits); ++u) {
      U unit = 0;
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t d = 2 * u + i;
        // What a diagonal cuts off is zero, as probabilities are.
        const bool cut =
            (kCausal == cpu::Causal::kKeyDepth && d > m) || (kCausal == cpu::Causal::kQueryDepth && d < m);
        const float x = d >= depth || cut ? 0.0f : to_float(to_bf16(number(random)));
        if (d < depth) at(a, m * depth + d) = x;
        unit |= bits(x) << (16 * i);
      }
      at(a_units, kTransposeA ? u * lda + m : m * lda + u) = unit;
    }
  for (std::int64_t d = 0; d < depth; ++d)
    for (std::int64_t n = 0; n < columns; ++n) {
      const float x = to_float(to_bf16(number(random)));
      at(b, d * columns + n) = x;
      at(b_units, d / 2 * columns + n) |= bits(x) << (16 * (d % 2));
    }
  std::vector<float> c(static_cast<std::size_t>(kBlock * columns), 0.5f);
  const PlainMatrices::Use use{};
  cpu::block_product_in_matrices<PlainMatrices, kTransposeA, kAdd, kCausal>(
      {c.data(), columns, a_units.data(), lda, b_units.data(), columns, rows, columns, units});
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t n = 0; n < columns; ++n) {
      if (kCausal == cpu::Causal::kKeyColumns && n > m) continue;
      double sum = kAdd ? 0.5 : 0.0;
      for (std::int64_t d = 0; d < depth; ++d)
        sum += static_cast<double>(at(a, m * depth + d)) * at(b, d * columns + n);
      ASSERT_NEAR(at(c, m * columns + n), sum, 1e-4)
          << rows << " x " << columns << " x " << depth << ": " << m << ", " << n;
    }
}

TEST(MatrixRegisters, ComputeBlocksOfAttention) {
  using cpu::Causal;
  for (const std::int64_t rows : {1, 15, 16, 17, 32, 33, 50, 63, 64}) {
    for (const std::int64_t depth : {32, 64, 96, 128})
      expect_block<false, false, Causal::kFull>(rows, 64, depth);
    expect_block<false, false, Causal::kKeyColumns>(rows, 64, 64);
    for (const std::int64_t columns : {32, 64, 96}) {
      for (const std::int64_t depth : {1, 31, 32, 47, 64}) {
        expect_block<false, true, Causal::kFull>(rows, columns, depth);
        expect_block<true, true, Causal::kFull>(rows, columns, depth);
      }
      expect_block<false, true, Causal::kKeyDepth>(rows, columns, rows);
      expect_block<true, true, Causal::kQueryDepth>(rows, columns, rows);
    }
  }
}

#else
TEST(MatrixRegisters, ComputeProductsOfEveryKind) {
  GTEST_SKIP() << "pairs of bf16 are no units of this build";
}
#endif

}  // namespace
}  // namespace upmoe::test

// Both of those who compute dense products, each alone: whoever is chosen on a processor, the other
// is tested as well.

#include "kernels/cpu/dense_product.h"

#include <gtest/gtest.h>

#include <array>

#include "kernels/cpu/packed_operands.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"

namespace upmoe::test {
namespace {

struct Kind {
  DType in, out;
  Transpose transpose_a, transpose_b;
  Accumulate mode;
  bool bias;
};

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  const DType types[][2] = {
      {DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}};
  for (const auto& [in, out] : types)
    for (const Transpose ta : {Transpose::kNo, Transpose::kYes})
      for (const Transpose tb : {Transpose::kNo, Transpose::kYes}) {
        all.push_back({in, out, ta, tb, Accumulate::kOverwrite, false});
        all.push_back({in, out, ta, tb, Accumulate::kOverwrite, true});
        all.push_back({in, out, ta, tb, Accumulate::kAdd, false});
      }
  return all;
}

struct Case {
  MatrixProduct p;
  Kind kind;
  HostTensor a, b, c, bias;

  Case(std::array<std::int64_t, 3> mnk, Kind k)
      : p{mnk[0], mnk[1], mnk[2], k.transpose_a, k.transpose_b},
        kind(k),
        a(random_tensor(p.transpose_a == Transpose::kNo ? Shape{p.m, p.k} : Shape{p.k, p.m}, k.in, 1)),
        b(random_tensor(p.transpose_b == Transpose::kNo ? Shape{p.k, p.n} : Shape{p.n, p.k}, k.in, 2)),
        c(random_tensor({p.m, p.n}, k.out, 3)),
        bias(random_tensor({p.n}, k.in, 4)) {}

  std::string name() const {
    return fmt::format("{}x{}x{} {} -> {} transpose {} {} add {} bias {}", p.m, p.n, p.k, name_of(kind.in),
                       name_of(kind.out), p.transpose_a == Transpose::kYes, p.transpose_b == Transpose::kYes,
                       kind.mode == Accumulate::kAdd, kind.bias);
  }
  std::vector<double> added() const {
    if (kind.mode == Accumulate::kAdd) return c.values();
    std::vector<double> rows;
    for (std::int64_t i = 0; kind.bias && i < p.m; ++i)
      for (double x : bias.values()) rows.push_back(x);
    return rows;
  }
  void run(Exec& ex, cpu::ComputeProduct compute) {
    compute(ex, {c, {a, p.transpose_a}, {b, p.transpose_b}, kind.mode, kind.bias ? bias : ConstTensorView{}});
  }
};

// The last ones: a depth that packed blocks cut, blocks of rows that end in each of a block's vectors, and few rows of
// a deep product, which are turned.
constexpr std::array<std::int64_t, 3> kShapes[] = {
    {1, 1, 1},     {1, 1, 500},  {1, 70, 1},  {3, 5, 2},    {7, 17, 33},  {64, 64, 64},   {50, 130, 1},
    {97, 65, 129}, {3, 5, 9001}, {8, 66, 31}, {36, 64, 16}, {137, 20, 8}, {70, 100, 1100}};

void expect_right(cpu::ComputeProduct compute, const Kind& kind) {
  for (const auto& shape : kShapes) {
    OpExec ex;
    Case test(shape, kind);
    const auto a = test.a.values(), b = test.b.values(), added = test.added();
    test.run(ex, compute);
    expect_sums(test.c.values(), reference_gemm(test.p, a.data(), b.data(), added), kind.out, test.name());
    EXPECT_EQ(ex.scratch_used(), 0u);
  }
}

TEST(DenseProduct, PackedBlocksComputeEveryKind) {
  for (const Kind& kind : kinds()) expect_right(cpu::multiply_packed_blocks, kind);
}

TEST(DenseProduct, OneDnnComputesWhatItSaysItDoes) {
  EXPECT_TRUE(cpu::onednn_computes(DType::kF32, DType::kF32));
  for (const Kind& kind : kinds()) {
    if (cpu::onednn_computes(kind.in, kind.out)) {
      expect_right(cpu::multiply_by_onednn, kind);
    } else {
      OpExec ex;
      Case test({4, 5, 6}, kind);
      EXPECT_THROW(test.run(ex, cpu::multiply_by_onednn), Error) << test.name();
    }
  }
}

TEST(DenseProduct, TheChosenOneComputesEveryKind) {
  for (const Kind& kind : kinds()) {
    const cpu::ComputeProduct chosen = cpu::product_for(kind.in, kind.out);
    const bool pairs = kind.in == DType::kBF16 && cpu::packed_blocks_have_bf16_instruction() &&
                       cpu::onednn_has_bf16_instruction();
    EXPECT_EQ(chosen == cpu::multiply_by_onednn, cpu::onednn_computes(kind.in, kind.out) && !pairs);
    OpExec ex;
    Case test({9, 10, 11}, kind);
    EXPECT_NO_THROW(test.run(ex, chosen)) << test.name();
  }
}

// Larger than one task, so that threads share it: of many rows, of few, of two chunks of columns.
TEST(DenseProduct, PackedBlocksAreTheSameForAnyNumberOfThreads) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const auto& shape : {std::array<std::int64_t, 3>{1000, 300, 70}, {20, 1000, 70}, {520, 700, 4096}})
      for (const Transpose transpose_a : {Transpose::kNo, Transpose::kYes}) {
        const Case test(shape, {dtype, dtype, transpose_a, Transpose::kYes, Accumulate::kOverwrite, true});
        expect_same_for_any_threads([&] {
          OpExec ex;
          Case again = test;
          again.run(ex, cpu::multiply_packed_blocks);
          return again.c;
        });
      }
}

// Every chunk of columns and every part of a large product, of too many rows to be turned, is where it belongs: its
// elements are those of products of one.
TEST(DenseProduct, PackedBlocksOfALargeProductAreThoseOfASmallOne) {
  const Case large({520, 1500, 2000}, {DType::kBF16, DType::kF32, Transpose::kNo, Transpose::kYes,
                                       Accumulate::kOverwrite, false});
  Case all = large;
  OpExec ex;
  all.run(ex, cpu::multiply_packed_blocks);
  for (std::int64_t row : {0, 95, 96, 519})
    for (std::int64_t column : {0, 64, 1023, 1024, 1088, 1499}) {
      Case one({1, 1, 2000}, large.kind);
      std::memcpy(one.a.host_view().data, large.a.on_host().rows(row, row + 1).data, 2000 * sizeof(bf16));
      std::memcpy(one.b.host_view().data, large.b.on_host().rows(column, column + 1).data,
                  2000 * sizeof(bf16));
      one.run(ex, cpu::multiply_packed_blocks);
      EXPECT_EQ(one.c.get(0), all.c.get(row * 1500 + column)) << row << ", " << column;
    }
}

TEST(DenseProduct, RowsAreIndependentWhereThatIsSaid) {
  for (const auto& [in, out] : {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}})
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{64, 60}, {60, 1100}, {33, 5000}}) {
      if (!cpu::rows_are_independent(in, out)) continue;
      Case all({300, n, k}, {in, out, Transpose::kNo, Transpose::kYes, Accumulate::kOverwrite, false});
      OpExec ex;
      all.run(ex, cpu::product_for(in, out));
      for (const std::int64_t rows : {1, 3, 8, 16, 50, 128}) {
        Case few({rows, n, k}, all.kind);
        const ConstTensorView first = all.a.on_host().rows(0, rows);
        std::memcpy(few.a.host_view().data, first.data, first.bytes());
        few.run(ex, cpu::product_for(in, out));
        const ConstTensorView found = few.c.on_host();
        EXPECT_EQ(std::memcmp(found.data, all.c.on_host().data, found.bytes()), 0)
            << few.name() << ", the first of " << all.name();
      }
    }
}

// No unit has an element from behind a row's depth, or of two rows.
TEST(DenseProduct, RowsLieAsUnitsWhereTheyCutNone) {
  const auto lie = []<class T>(T, std::int64_t stride, bool depth_major, std::int64_t depth) {
    return cpu::lie_as_units(cpu::Operand<T>{nullptr, stride, depth_major}, depth);
  };
  EXPECT_EQ(lie(bf16{}, 6, false, 4), cpu::packed_blocks_have_bf16_instruction());
  EXPECT_FALSE(lie(bf16{}, 6, false, 5));
  EXPECT_FALSE(lie(bf16{}, 5, false, 4));
  EXPECT_FALSE(lie(bf16{}, 6, true, 4));
  EXPECT_TRUE(lie(0.0f, 5, false, 3));
  EXPECT_FALSE(lie(0.0f, 5, true, 3));
}

// 256 + (1 + 2^-9) lies above the middle of the bf16 neighbours 256 and 258: rounding the product first gives 256.
TEST(DenseProduct, PackedBlocksRoundOnce) {
  OpExec ex;
  Case test({1, 1, 2}, {DType::kBF16, DType::kBF16, Transpose::kNo, Transpose::kNo, Accumulate::kAdd, false});
  test.a = tensor_of({1, 2}, DType::kBF16, {1, std::ldexp(1.0, -9)});
  test.b = filled({2, 1}, DType::kBF16, 1);
  test.c = test.bias = filled({1, 1}, DType::kBF16, 256);
  test.run(ex, cpu::multiply_packed_blocks);
  EXPECT_EQ(test.c.get(0), 258);
  test.kind.mode = Accumulate::kOverwrite;
  test.kind.bias = true;
  test.bias = filled({1}, DType::kBF16, 256);
  test.run(ex, cpu::multiply_packed_blocks);
  EXPECT_EQ(test.c.get(0), 258);
}

}  // namespace
}  // namespace upmoe::test

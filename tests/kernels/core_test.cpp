// bf16, Philox, shapes, arenas, the ledger, and the CUDA backend of a build without CUDA.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <set>

#include "kernels/core/exec.h"
#include "kernels/core/gpu.h"
#include "kernels/core/philox.h"
#include "kernels/ops/pointwise.h"

namespace upmoe::test {
namespace {

TEST(Bf16, RoundsEveryFloatToTheNearest) {
  // All neighbours of bf16 numbers: the middles, just below, just above.
  for (std::uint32_t upper = 0; upper < 0x7f80u; ++upper) {
    const auto from_bits = [](std::uint32_t bits) { return to_bf16(std::bit_cast<float>(bits)).bits; };
    const std::uint32_t low = upper << 16;
    ASSERT_EQ(from_bits(low), upper);
    ASSERT_EQ(from_bits(low | 0x7fffu), upper);
    ASSERT_EQ(from_bits(low | 0x8001u), upper + 1);  // up to infinity above the largest
    ASSERT_EQ(from_bits(low | 0x8000u), upper + (upper & 1));
    ASSERT_EQ(from_bits(low | 0x80008001u), (upper + 1) | 0x8000u);
  }
}

TEST(Bf16, KeepsNan) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xffffffffu, 0x7fffffffu})
    EXPECT_TRUE(std::isnan(to_float(to_bf16(std::bit_cast<float>(bits))))) << bits;
  EXPECT_EQ(to_float(to_bf16(INFINITY)), INFINITY);
}

// The known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox(0, 0), (Philox4{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  const std::uint64_t ones = ~std::uint64_t{0};
  EXPECT_EQ(philox(ones, ones, ones), (Philox4{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(philox(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu),
            (Philox4{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, KeysDifferByNameAndSeed) {
  std::set<std::uint64_t> keys;
  for (std::uint64_t seed : {0, 1, 2})
    for (const char* name : {"", "a", "b", "ab", "ba"}) keys.insert(philox_key(seed, name));
  EXPECT_EQ(keys.size(), 15u);
}

TEST(Philox, UniformsStayInside) {
  EXPECT_GT(uniform_from_bits(0), 0.0f);
  EXPECT_LT(uniform_from_bits(0xffffffffu), 1.0f);
}

TEST(Shape, CountsElementsAndRefusesOverflow) {
  EXPECT_EQ(Shape{}.elements(), 1);
  EXPECT_EQ((Shape{3, 0, 5}).elements(), 0);
  EXPECT_EQ((Shape{60, 1408, 2, 2048}).elements(), 346030080);
  EXPECT_EQ((Shape{60, 1408, 2, 2048}).str(), "[60, 1408, 2, 2048]");
  EXPECT_EQ((Shape{3, 4})[-1], 4);
  const std::int64_t large = std::int64_t{1} << 40;
  EXPECT_THROW((Shape{large, large}).elements(), Error);
  EXPECT_THROW((Shape{-1}), Error);
  EXPECT_THROW((Shape{1, 1, 1, 1, 1}), Error);
  EXPECT_THROW((Shape{3, 4})[2], Error);
  EXPECT_THROW(checked_mul(large, large), Error);
  EXPECT_THROW(checked_add(std::numeric_limits<std::int64_t>::max(), 1), Error);
}

TEST(TensorViews, CutRowsAndReshape) {
  float values[12];
  const TensorView v = host_view(values, {4, 3});
  EXPECT_EQ(v.rows(1, 3).as<float>(), values + 3);
  EXPECT_EQ(v.rows(1, 3).shape, (Shape{2, 3}));
  EXPECT_EQ(v.rows(4, 4).elements(), 0);
  EXPECT_EQ(v.reshape({2, 6}).shape, (Shape{2, 6}));
  EXPECT_THROW(v.rows(2, 5), Error);
  EXPECT_THROW(v.rows(3, 2), Error);
  EXPECT_THROW(v.reshape({5}), Error);
  EXPECT_THROW(v.as<bf16>(), Error);
}

TEST(BufferMemory, IsZeroAndAligned) {
  const Buffer b = Buffer::allocate({}, 1000);
  const TensorView v = b.view({250}, DType::kF32);
  for (int i = 0; i < 250; ++i) EXPECT_EQ(v.as<float>()[i], 0.0f);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data()) % 64, 0u);
  EXPECT_THROW(b.view({251}, DType::kF32), Error);
  EXPECT_EQ(Buffer::allocate({DeviceType::kDry, 0}, std::size_t{1} << 60).data(), nullptr);
}

TEST(ArenaMemory, HandsOutRewindsAndRemembersThePeak) {
  Arena arena({}, 4096, "test");
  const TensorView a = arena.take({10}, DType::kF32, "a");
  const std::size_t mark = arena.mark();
  {
    ScratchScope scope(arena);
    const TensorView b = arena.take({100}, DType::kF64, "b");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data) % 256, 0u);
    EXPECT_GE(b.data, a.data + a.bytes());
  }
  EXPECT_EQ(arena.used(), mark);
  EXPECT_GE(arena.peak(), mark + 800);
  arena.rewind(0);
  EXPECT_THROW(arena.rewind(1), Error);
}

TEST(ArenaMemory, NamesItsLargestUsersWhenFull) {
  Arena arena({}, 4096, "small");
  arena.take({512}, DType::kF32, "the large one");
  try {
    arena.take({1024}, DType::kF32, "one more");
    FAIL() << "took more than there is";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(),
                testing::AllOf(testing::HasSubstr("'small' is full"), testing::HasSubstr("one more"),
                               testing::HasSubstr("the large one")));
  }
}

// A limit of address space (ulimit -v) is met by asking for less of it, not by an error.
TEST(ArenaMemory, ReservesWhatALimitOfAddressSpaceLeaves) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer takes more address space for itself than the limit leaves";
#endif
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limit{std::size_t{8} << 30, RLIM_INFINITY};
    int status = setrlimit(RLIMIT_AS, &limit) == 0 ? 0 : 1;
    try {
      Arena scratch({}, std::size_t{64} << 30, "scratch"), keep({}, std::size_t{64} << 30, "activations");
      const TensorView taken = keep.take({1 << 20}, DType::kF32, "some");
      taken.as<float>()[taken.elements() - 1] = 1;
      const Buffer parameters = Buffer::allocate({}, std::size_t{4} << 30, "parameters");
      try {
        scratch.take({std::int64_t{1} << 31}, DType::kF32, "too much");
        status = 2;
      } catch (const Error& e) {
        if (std::string(e.what()).find("ulimit -v unlimited") == std::string::npos) status = 3;
      }
    } catch (const std::exception&) {
      status = 4;
    }
    _exit(status);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(ArenaMemory, OnTheDryDeviceCountsWithoutMemory) {
  Arena arena({DeviceType::kDry, 0}, 1, "dry");
  EXPECT_EQ(arena.take({std::int64_t{1} << 40}, DType::kF32, "weights").data, nullptr);
  EXPECT_EQ(arena.peak(), std::size_t{1} << 42);
}

class LedgerBook : public testing::Test {
 protected:
  LedgerBook() { ex.ledger = &ledger; }
  Ledger ledger;
  Exec ex;
};

TEST_F(LedgerBook, AddsUpByName) {
  ledger.book("gemm", 10, 20, 30);
  ledger.book("gemm", 1, 2, 3);
  ledger.book_sent("all_reduce", 40);
  EXPECT_EQ(ledger.entries().at("gemm").calls, 2);
  EXPECT_EQ(ledger.entries().at("gemm").flops, 11);
  const Cost total = ledger.total();
  EXPECT_EQ(total.flops, 11);
  EXPECT_EQ(total.bytes_read, 22);
  EXPECT_EQ(total.bytes_written, 33);
  EXPECT_EQ(total.bytes_sent, 40);
  ledger.book_wait(0.5);
  ledger.book_wait(0.25);
  EXPECT_EQ(ledger.seconds_waited(), 0.75);
  EXPECT_EQ(ledger.entries().size(), 2u);
  ledger.clear();
  EXPECT_TRUE(ledger.entries().empty());
  EXPECT_EQ(ledger.seconds_waited(), 0);
}

TEST_F(LedgerBook, MarksModelWorkWhateverTheOpIsCalled) {
  ex.book("gemm of something else", 7, 0, 0);
  ex.book("anything", 100, 0, 0, Work::kProduct);
  ex.book("anything", 3, 0, 0, Work::kProduct);
  EXPECT_EQ(ledger.total().model_flops, 103);
  EXPECT_EQ(ledger.total().flops, 110);
  EXPECT_EQ(ledger.entries().at("anything").model_flops, 103);
}

TEST_F(LedgerBook, KeepsAttentionApartAndAddsTimesOver) {
  ex.book("attention", 5, 0, 0);
  ex.book("scores", 7, 0, 0, Work::kAttention);
  ex.book("scores", 9, 0, 0, Work::kAttentionBackward);
  ex.book("gemm", 100, 20, 30, Work::kProduct);
  ex.book("gate", 1, 0, 0, Work::kRowSums);
  Cost cost = ledger.total();
  EXPECT_EQ(cost.attention_flops, 16);
  EXPECT_EQ(cost.model_flops, 117);
  cost.add(ledger.entries().at("gemm"), 0.5);
  EXPECT_EQ(cost.model_flops, 167);
  EXPECT_EQ(cost.flops, 172);
  EXPECT_EQ(cost.bytes_read, 30);
  EXPECT_EQ(cost.bytes_written, 45);
  EXPECT_EQ(cost.calls, 6) << "half a call is one";
  EXPECT_EQ(cost.attention_flops, 16);
}

// A profile has a line of its own for what is computed twice; the books do not.
TEST_F(LedgerBook, WhatIsDoneAgainIsToldAndNotBooked) {
  std::vector<std::pair<std::string, Books>> told;
  ledger.listen([&](const ToldOp& op) { told.emplace_back(op.name, op.books); });
  ex.book("gemm", 8, 1, 1, Work::kProduct);
  not_booked(ex).book("gemm", 8, 1, 1, Work::kProduct);
  EXPECT_EQ(told, (decltype(told){{"gemm", Books::kModel}, {"gemm", Books::kAgain}}));
  EXPECT_EQ(ledger.entries().size(), 1u);
  EXPECT_EQ(ledger.total().flops, 8);
  ledger.listen({});
  not_booked(ex).book("gemm", 8, 1, 1);  // nobody listens
}

TEST_F(LedgerBook, KeepsTheModelsWorkAndWhatIsDoneAgainApart) {
  std::vector<std::pair<std::string, Books>> told;
  ledger.listen([&](const ToldOp& op) { told.emplace_back(op.name, op.books); });
  ex.book("gemm", 10, 20, 30, Work::kProduct);
  ex.book("norm", 1, 2, 3);
  const Exec again = not_booked(ex);
  again.book("gemm", 10, 20, 30, Work::kProduct);
  again.book("norm", 1, 2, 3);
  const Cost total = ledger.total();
  EXPECT_EQ(total.calls, 2);
  EXPECT_EQ(total.flops, 11);
  EXPECT_EQ(total.bytes_read, 22);
  EXPECT_EQ(total.model_flops, 10);
  EXPECT_EQ(total.model_again, 10);
  EXPECT_EQ(told, (decltype(told){{"gemm", Books::kModel},
                                  {"norm", Books::kModel},
                                  {"gemm", Books::kAgain},
                                  {"norm", Books::kAgain}}));
}

// As what is done again: neither in the model's books nor in those of what ops do, and told as the teacher's.
TEST_F(LedgerBook, KeepsATeachersWorkApart) {
  std::vector<std::pair<std::string, Books>> told;
  ledger.listen([&](const ToldOp& op) { told.emplace_back(op.name, op.books); });
  ex.book("gemm", 10, 20, 30, Work::kProduct);
  const Exec teacher = for_teacher(ex);
  teacher.book("gemm", 5, 20, 30, Work::kProduct);
  teacher.book("norm", 1, 2, 3);
  not_booked(teacher).book("gemm", 7, 20, 30, Work::kProduct);  // all of it is the teacher's
  const Cost total = ledger.total();
  EXPECT_EQ(total.calls, 1);
  EXPECT_EQ(total.flops, 10);
  EXPECT_EQ(total.bytes_read, 20);
  EXPECT_EQ(total.model_flops, 10);
  EXPECT_EQ(total.model_again, 0);
  EXPECT_EQ(total.teacher_flops, 12);
  EXPECT_EQ(told, (decltype(told){{"gemm", Books::kModel},
                                  {"gemm", Books::kTeacher},
                                  {"norm", Books::kTeacher},
                                  {"gemm", Books::kTeacher}}));
}

TEST(Errors, NameConditionAndPlace) {
  try {
    const int found = 3;
    UPMOE_CHECK(found == 4, "found {}", found);
    FAIL() << "the check passed";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kFailure);
    EXPECT_THAT(e.what(), testing::AllOf(testing::HasSubstr("found == 4"), testing::HasSubstr("found 3"),
                                         testing::HasSubstr("core_test.cpp")));
  }
}

TEST(CudaStub, SaysThatThereIsNoCuda) {
  if (gpu::is_built()) GTEST_SKIP() << "this build has CUDA";
  Exec ex;
  ex.device = {DeviceType::kCuda, 0};
  std::byte memory[sizeof(float)];
  try {
    ops::fill(ex, {memory, {1}, DType::kF32, ex.device}, 1.0f);
    FAIL() << "computed on a device that is not there";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kDevice);
    EXPECT_THAT(e.what(), testing::HasSubstr("without CUDA"));
  }
}

}  // namespace
}  // namespace upmoe::test

// What ops and transfers take on a described machine, and what goes on beside what.

#include "trainer/plan/step_clock.h"

#include <gmock/gmock.h>

#include <array>
#include <cmath>
#include <fstream>

#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

using testing::HasSubstr;

// Numbers that can be added up in the head.
Machine plain() {
  Machine m;
  m.name = "plain";
  m.source = "none";
  m.bf16_tflops = 100;
  m.fp32_tflops = 10;
  m.memory_gb = 10;
  m.memory_gb_per_s = 100;
  m.ranks_per_node = 2;
  m.rates.edges = {100, 1000};
  m.rates.gemm_bf16 = m.rates.grouped_bf16 = {10, 50};
  m.rates.attention_forward_bf16 = 20;
  m.rates.attention_backward_bf16 = 10;
  m.rates.copy_gb_per_s = 100;
  m.inside_node = {.gb_per_s = 10, .latency_us = 0, .overlap = 1};
  m.between_nodes = {.gb_per_s = 1, .latency_us = 0, .overlap = 0.5};
  return m;
}

// m = n = k = edge, in bf16.
Cost cube(double edge) {
  Cost cost;
  cost.flops = 2 * edge * edge * edge;
  cost.bytes_read = 4 * edge * edge;
  cost.bytes_written = 2 * edge * edge;
  return cost;
}

Cost copied(double bytes) {
  Cost cost;
  cost.bytes_read = bytes;
  return cost;
}

TEST(RankSpeed, TakesTheRateOfAProductFromItsEdge) {
  Machine m = plain();
  m.rates.copy_gb_per_s = 1e5;  // so that products are never bound by memory
  const RankSpeed speed(m, Precision::kBf16, 1);
  const auto rate = [&](double edge) {
    const Cost cost = cube(edge);
    return cost.flops / speed.op_seconds(Work::kProduct, cost) * 1e-12;
  };
  EXPECT_NEAR(rate(1000), 50, 1e-6);
  EXPECT_NEAR(rate(5000), 50, 1e-6);
  EXPECT_NEAR(rate(std::sqrt(100.0 * 1000.0)), 30, 1e-6) << "half way of the logarithm";
  EXPECT_NEAR(rate(50), 5, 1e-6) << "below the first edge in proportion";
  EXPECT_NEAR(speed.op_seconds(Work::kGroupedProducts, cube(1000)),
              speed.op_seconds(Work::kProduct, cube(1000)), 1e-12);
  EXPECT_NEAR(speed.op_seconds(Work::kAttention, {.flops = 20e12}), 1, 1e-9);
  EXPECT_NEAR(speed.op_seconds(Work::kAttentionBackward, {.flops = 20e12}), 2, 1e-9);
}

TEST(RankSpeed, WhatIsBoundByMemoryTakesItsBytes) {
  Machine m = plain();
  EXPECT_NEAR(RankSpeed(m, Precision::kBf16, 1).op_seconds(Work::kOther, copied(100e9)), 1, 1e-9);
  EXPECT_NEAR(RankSpeed(m, Precision::kBf16, 1).op_seconds(Work::kProduct, copied(100e9)), 1, 1e-9);
  m.rates.op_us = 10;
  EXPECT_NEAR(RankSpeed(m, Precision::kBf16, 1).op_seconds(Work::kOther, copied(0)), 1e-5, 1e-12);
}

TEST(RankSpeed, RanksOfACpuShareIt) {
  Machine m = plain();
  m.shared_by_ranks = true;
  const RankSpeed alone(m, Precision::kBf16, 1), beside(m, Precision::kBf16, 2);
  EXPECT_DOUBLE_EQ(beside.op_seconds(Work::kProduct, cube(1000)),
                   2 * alone.op_seconds(Work::kProduct, cube(1000)));
  EXPECT_DOUBLE_EQ(beside.op_seconds(Work::kOther, copied(1e9)),
                   2 * alone.op_seconds(Work::kOther, copied(1e9)));
  EXPECT_DOUBLE_EQ(beside.peak_flops_per_s(), alone.peak_flops_per_s() / 2);
  EXPECT_DOUBLE_EQ(beside.memory_bytes(), alone.memory_bytes() / 2);
}

TEST(RankSpeed, NamesTheKeysThatLack) {
  try {
    RankSpeed(plain(), Precision::kFp32, 1);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_THAT(e.what(),
                testing::AllOf(HasSubstr("rates.gemm_fp32"), HasSubstr("rates.attention_backward_fp32")));
  }
  Machine m = plain();
  m.between_nodes.gb_per_s = 0;
  EXPECT_THAT(missing_keys(m, Precision::kBf16, 2), testing::IsEmpty());
  EXPECT_THAT(missing_keys(m, Precision::kBf16, 3), testing::ElementsAre("between_nodes.gb_per_s"));
}

class Clock : public testing::Test {
 protected:
  std::function<void()> send_to_all(const std::vector<int>& members, double each) {
    return clock_.begin({.verb = "all_gather", .members = members, .me = 0, .each = each});
  }
  RankSpeed speed_{plain(), Precision::kBf16, 8};
  StepClock clock_{&speed_, 2};
};

TEST_F(Clock, ATransferGoesOnBesideOps) {
  const auto wait = send_to_all({0, 1}, 10e9);     // a second, inside
  clock_.op({"add", Work::kOther, copied(40e9)});  // 0.4
  wait();
  const StepTime time = clock_.take();
  EXPECT_NEAR(time.compute, 0.4, 1e-9);
  EXPECT_NEAR(time.waited.at("all_gather"), 0.6, 1e-9);
  EXPECT_NEAR(time.seconds(), 1.0, 1e-9);
  EXPECT_EQ(time.sent.at("all_gather").inside, 10e9);
  EXPECT_EQ(clock_.take().seconds(), 0);
}

TEST_F(Clock, AsFarAsTheLinkAllows) {
  const auto wait = send_to_all({0, 2}, 1e9);  // a second, between nodes
  clock_.op({"add", Work::kOther, copied(40e9)});
  wait();
  const StepTime time = clock_.take();
  EXPECT_NEAR(time.waited.at("all_gather"), 0.8, 1e-9);
  EXPECT_EQ(time.sent.at("all_gather").between, 1e9);
  EXPECT_EQ(time.sent.at("all_gather").inside, 0);
}

TEST_F(Clock, TransfersTakeTheirTurns) {
  const auto first = send_to_all({0, 1}, 10e9), second = send_to_all({0, 1}, 10e9);
  clock_.op({"add", Work::kOther, copied(150e9)});
  first();
  second();
  const StepTime time = clock_.take();
  EXPECT_NEAR(time.waited.at("all_gather"), 0.5, 1e-9);
}

class SkewedClock : public testing::Test {
 protected:
  static Machine skewed() {
    Machine m = plain();
    m.rates.skew = 0.1;
    return m;
  }
  std::function<void()> send_to_all(double each) {
    return clock_.begin({.verb = "all_gather", .members = members_, .me = 0, .each = each});
  }
  double waited() { return clock_.take().waited["all_gather"]; }
  std::vector<int> members_{0, 1};
  RankSpeed speed_{skewed(), Precision::kBf16, 2};
  StepClock clock_{&speed_, 2};
};

TEST_F(SkewedClock, TheLastRankIsLateByAShareOfWhatWasComputed) {
  clock_.op({"add", Work::kOther, copied(100e9)});  // a second
  send_to_all(10e9)();                              // another
  EXPECT_NEAR(waited(), 1.1, 1e-9);
  send_to_all(10e9)();
  EXPECT_NEAR(waited(), 1, 1e-9) << "they have just met";
  clock_.op({"add", Work::kOther, copied(200e9)});
  send_to_all(10e9)();
  EXPECT_NEAR(waited(), 1.2, 1e-9);
}

TEST_F(SkewedClock, WorkHidesWhatRanksAreLate) {
  clock_.op({"add", Work::kOther, copied(100e9)});
  const auto wait = send_to_all(10e9);
  clock_.op({"add", Work::kOther, copied(4e9)});
  clock_.op({"add", Work::kOther, copied(5e9)});  // 0.09 in all: less than the last is late
  wait();
  EXPECT_NEAR(waited(), 1.01, 1e-9);
  clock_.op({"add", Work::kOther, copied(100e9)});
  const auto other = send_to_all(10e9);
  clock_.op({"add", Work::kOther, copied(50e9)});  // beside 0.4 of the transfer
  other();
  EXPECT_NEAR(waited(), 0.6, 1e-9);
}

TEST_F(SkewedClock, RanksThatDoNotWaitDoNotMeet) {
  clock_.op({"add", Work::kOther, copied(100e9)});
  const auto first = send_to_all(10e9);
  clock_.op({"add", Work::kOther, copied(200e9)});
  first();  // long done
  const auto second = send_to_all(10e9);
  second();
  EXPECT_NEAR(waited(), 1.3, 1e-9);
}

TEST_F(Clock, RowsAreCountedByWhereTheyGo) {
  const std::array<std::int64_t, 4> rows{5, 1, 2, 3};
  const std::vector<int> members{0, 1, 2, 3};
  clock_.begin({.verb = "all_to_all_rows", .members = members, .me = 0, .rows = rows, .row_bytes = 1e9})();
  const StepTime time = clock_.take();
  EXPECT_EQ(time.sent.at("all_to_all_rows").inside, 1e9);
  EXPECT_EQ(time.sent.at("all_to_all_rows").between, 5e9);
  EXPECT_NEAR(time.waited.at("all_to_all_rows"), 5, 1e-9) << "the slower of two links that work together";
}

TEST_F(Clock, NobodyWaitsForAGroupOfOneOrForWhatWasSent) {
  const std::vector<int> one{3}, two{3, 4};
  EXPECT_FALSE(clock_.begin({.verb = "all_reduce", .members = one, .me = 0, .each = 1e9}));
  EXPECT_FALSE(clock_.begin({.verb = "send", .members = two, .me = 0, .each = 1e9}));
  EXPECT_EQ(clock_.take().sent.at("send").between, 1e9);
}

TEST(DryWire, SeesWhatIsSentToWhom) {
  struct Seen final : DryWire {
    std::vector<std::string> verbs;
    std::vector<std::vector<int>> members;
    std::vector<double> each;
    int waits = 0;
    std::function<void()> begin(const DryTransfer& t) override {
      verbs.emplace_back(t.verb);
      members.emplace_back(t.members.begin(), t.members.end());
      each.push_back(t.each);
      return [this] { ++waits; };
    }
  } seen;
  const auto world = make_dry_communicator(5, 8, &seen);
  const auto group = world->subgroup({1, 5, 7});
  std::array<float, 6> values{};
  group->all_reduce(host_view(values.data(), {6}), ReduceOp::kSum);
  group->all_gather(host_view(values.data(), {6}), host_view(values.data(), {2})).wait();
  group->send(host_view(values.data(), {4}), 2);
  EXPECT_THAT(seen.verbs, testing::ElementsAre("all_reduce", "all_gather", "send"));
  EXPECT_THAT(seen.members[0], testing::ElementsAre(1, 5, 7));
  EXPECT_THAT(seen.members[2], testing::ElementsAre(5, 7));
  EXPECT_EQ(seen.each[0], 2 * 24.0 / 3);
  EXPECT_EQ(seen.each[1], 8);
  EXPECT_EQ(seen.each[2], 16);
  EXPECT_EQ(seen.waits, 3);
}

TEST(MachineFile, IsReadAsItWasWritten) {
  const test::TemporaryDirectory dir;
  const std::filesystem::path file = dir.path() / "machine.yaml";
  for (const char* name : {"h100-sxm", "h200-sxm", "a100-80"}) {
    const Machine shipped = read_machine(std::filesystem::path(UPMOE_SOURCE_DIR) / "configs" / "machines" /
                                         (std::string(name) + ".yaml"));
    std::ofstream(file) << to_yaml(shipped);
    const Machine again = read_machine(file);
    EXPECT_EQ(to_yaml(again), to_yaml(shipped));
    EXPECT_EQ(again.rates.gemm_bf16, shipped.rates.gemm_bf16);
    EXPECT_EQ(again.between_nodes.gb_per_s, shipped.between_nodes.gb_per_s);
  }
}

TEST(MachineFile, RefusesUnknownKeysAndListsOfOtherLengths) {
  const test::TemporaryDirectory dir;
  const std::filesystem::path file = dir.path() / "machine.yaml";
  std::ofstream(file) << to_yaml(plain()) << "disk: {gb_per_second: 1}\n";
  const auto message = [&] {
    try {
      read_machine(file);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  EXPECT_THAT(message(), HasSubstr("unknown key 'disk.gb_per_second'"));
  Machine uneven = plain();
  uneven.rates.gemm_bf16 = {1, 2, 3};
  std::ofstream(file) << to_yaml(uneven);
  EXPECT_THAT(message(), testing::AllOf(HasSubstr("rates.gemm_bf16"), HasSubstr("3 rates for 2")));
}

}  // namespace
}  // namespace upmoe

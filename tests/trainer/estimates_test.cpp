// What a run says of its machine: the peak that MFU is a share of, and the memory it will take.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/ops/gemm.h"
#include "kernels/ops/product_rate.h"
#include "parallel/self_comm.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_moe.h"
#include "trainer/memory_estimate.h"
#include "trainer/metrics.h"
#include "trainer/peak.h"

namespace upmoe {
namespace {

TEST(Peak, IsTheBestRateSeenSoNoShareIsAboveOne) {
  PeakRate peak(DType::kBF16);
  EXPECT_EQ(peak.share(0, 1), 0);
  EXPECT_EQ(peak.share(1e9, 1), 1);
  EXPECT_EQ(peak.share(5e8, 1), 0.5);
  EXPECT_EQ(peak.share(2e9, 1), 1);  // faster than what was measured while the machine was busy
  EXPECT_EQ(peak.share(1e9, 1), 0.5);
  EXPECT_EQ(peak.flops_per_s(), 2e9);
}

TEST(Peak, AFasterProductRaisesIt) {
  RankMemory memory(Device{});
  const Buffer data = Buffer::allocate({}, 3 * 256 * 256 * sizeof(float));
  const TensorView all = data.view({3 * 256, 256}, DType::kF32);
  ops::gemm(memory.exec, all.rows(0, 256), {all.rows(256, 512)}, {all.rows(512, 768), Transpose::kYes},
            Accumulate::kOverwrite);
  PeakRate peak(DType::kF32);
  peak.saw(1, 1);  // one FLOP a second
  EXPECT_LT(peak.share(1, 1), 1e-3);
  EXPECT_GE(peak.flops_per_s(), ops::fastest_product(DType::kF32));
}

// From a peak that is planted far too low, in the lines that a run writes. Its steps are faster than any product of
// this process.
TEST(Peak, NoLineOfARunSaysAShareAboveOne) {
  const test::TemporaryDirectory dir;
  RunConfig run;
  run.train.steps = 3;
  run.log.tensorboard = false;
  PeakRate planted(DType::kF32);
  planted.saw(1, 1);
  {
    Metrics metrics(dir.path(), run, 0, 1, planted);
    StepReport report;
    report.flops_per_rank = 1e18;
    for (const double seconds : {0.5, 0.25, 1.0}) {
      ++report.step;
      report.seconds = seconds;
      report.seconds_waited.reset();  // as on a GPU
      if (report.step == 2) report.seconds_waited = 0.125;
      metrics.step(report);
    }
  }
  std::vector<double> shares, waited;
  std::ifstream in(dir.path() / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    const auto j = nlohmann::json::parse(line);
    shares.push_back(j.at("mfu").get<double>());
    waited.push_back(j.value("seconds_waited", -1.0));
  }
  EXPECT_EQ(shares, (std::vector<double>{1, 1, 0.25}));
  EXPECT_EQ(waited, (std::vector<double>{-1, 0.125, -1}));
}

// What a killed attempt has said of steps that are computed again: the lines go, and readers of TensorBoard's files are
// told to forget the points.
TEST(Metrics, WhatIsComputedAgainIsSaidOnce) {
  RunConfig run;
  run.train.steps = 8;
  for (const std::int64_t from_step : {0, 5}) {
    const test::TemporaryDirectory dir;
    {
      std::ofstream out(dir.path() / "metrics.jsonl");
      for (const int step : {0, 5, 6}) out << fmt::format("{{\"kind\":\"eval\",\"step\":{}}}\n", step);
    }
    const Metrics metrics(dir.path(), run, from_step, 1, PeakRate(DType::kF32));
    std::ifstream in(dir.path() / "metrics.jsonl");
    std::vector<std::int64_t> kept;
    for (std::string line; std::getline(in, line);)
      kept.push_back(nlohmann::json::parse(line).at("step").get<std::int64_t>());
    EXPECT_EQ(kept, from_step == 0 ? std::vector<std::int64_t>{} : (std::vector<std::int64_t>{0, 5}));
    const auto file = std::filesystem::directory_iterator(dir.path() / "tensorboard")->path();
    std::ifstream events(file, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(events), {}};
    // Step, then session_log (field 7) with status (field 1) START (1), behind the wall time.
    const char step = static_cast<char>(from_step == 0 ? 0 : 6);
    EXPECT_THAT(bytes, testing::HasSubstr(std::string{0x10, step, 0x3a, 0x02, 0x08, 0x01}));
  }
}

TEST(Memory, LeftIsTheLessOfTheHostAndTheContainer) {
  const test::TemporaryDirectory dir;
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories((dir.path() / path).parent_path());
    std::ofstream(dir.path() / path) << text << "\n";
  };
  const std::string meminfo = "MemTotal:       100 kB\nMemAvailable:       80 kB\n";
  const auto left = [&] { return memory_left(dir.path(), "0::/job\n", meminfo); };
  EXPECT_EQ(left(), 80 * 1024);
  write("job/memory.max", "max");
  EXPECT_EQ(left(), 80 * 1024);
  write("memory.max", "60000");
  write("memory.current", "50000");
  EXPECT_EQ(left(), 10000);
  write("memory.stat", "anon 20000\ninactive_file 5000\nactive_file 1000");
  EXPECT_EQ(left(), 16000);
}

TEST(Memory, AnEstimateCountsWhatARankHolds) {
  const ModelConfig config = test::tiny_moe_config();
  RunConfig run;
  run.data.seq_len = 32;
  run.train.micro_batch = 1;
  run.train.global_batch = 2;
  const auto estimate = [&] { return estimate_memory(run, config, 0, 1); };
  const auto ratio = [](std::size_t a, std::size_t b) {
    return static_cast<double>(a) / static_cast<double>(b);
  };
  const MemoryEstimate one = estimate();
  run.train.micro_batch = 2;
  const MemoryEstimate two = estimate();
  const std::size_t weights_and_gradients = one.step.parameters + one.step.gradients;
  EXPECT_EQ(two.step.parameters + two.step.gradients, weights_and_gradients);
  EXPECT_GT(weights_and_gradients, 0u);
  // fp32: weights and gradients are 8 bytes a parameter, moments 8, the copy 12; rounded up to whole lines.
  EXPECT_NEAR(ratio(one.step.optimizer, weights_and_gradients), 1.0, 0.05);
  EXPECT_NEAR(ratio(one.checkpoint, weights_and_gradients), 1.5, 0.05);
  EXPECT_NEAR(ratio(two.step.activations, one.step.activations), 2.0, 0.2);
  EXPECT_EQ(one.step.buckets, 0u);  // nobody to send to
  EXPECT_THAT(describe(one), testing::HasSubstr("activations"));
}

}  // namespace
}  // namespace upmoe

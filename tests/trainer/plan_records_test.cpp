// Plans beside the committed records of real GPUs: memory within 5 %, the time of a step within 15 %.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/full_size.h"
#include "trainer/plan/run_plan.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr double kMemory = 0.05, kSeconds = 0.15;

// As tests/bench/bench_step runs it (tests/gpu_suite.sh).
struct Step {
  const char* name;
  int layers;
  std::int64_t tokens;
  Recompute recompute = Recompute::kNone;
  OptimizerKind optimizer = OptimizerKind::kAdamW8bit;
};
constexpr Step kSteps[] = {{"full_16384_none", 24, 16384},
                           {"full_24576_swiglu", 24, 24576, Recompute::kSwiglu},
                           {"full_32768_routed_up", 24, 32768, Recompute::kRoutedUp},
                           {"largest_19_layers", 19, 8192, Recompute::kRoutedUp},
                           {"four_layers_8192", 4, 8192},
                           {"four_layers_16384", 4, 16384},
                           {"four_layers_32768", 4, 32768},
                           {"four_layers_adamw", 4, 16384, Recompute::kNone, OptimizerKind::kAdamW}};

RunConfig run_of(const Step& step) {
  RunConfig run;
  run.data.seq_len = 2048;
  run.train.global_batch = run.train.micro_batch = step.tokens / run.data.seq_len;
  run.train.precision = run.parallel.reduce = Precision::kBf16;
  run.train.recompute = step.recompute;
  run.optimizer.name = step.optimizer;
  return run;
}

ModelConfig model_of(const Step& step) {
  ModelConfig model = full_size();
  model.num_hidden_layers = step.layers;
  return model;
}

int compare(const char* machine, const char* gpu) {
  const fs::path root(UPMOE_SOURCE_DIR);
  const Machine described = read_machine(root / "configs" / "machines" / (std::string(machine) + ".yaml"));
  int compared = 0;
  for (const fs::directory_entry& file : fs::directory_iterator(root / "tests/bench/results")) {
    const std::string name = file.path().filename().string();
    if (name.rfind(std::string("gpu_suite_") + gpu + "_", 0) != 0) continue;
    std::ifstream in(file.path());
    const json record = json::parse(in);
    for (const Step& step : kSteps) {
      if (!record.at("steps").contains(step.name)) continue;
      const json& measured = record.at("steps").at(step.name);
      const RunPlan plan = plan_run(run_of(step), model_of(step), 1, described);
      const double mib = measured.at("gpu_memory_used_mib_peak"), seconds = measured.at("seconds");
      const double planned_mib = plan.bytes_of(plan.fullest()) / (1024.0 * 1024.0);
      EXPECT_NEAR(planned_mib / mib, 1, kMemory) << name << ": " << step.name;
      EXPECT_NEAR(plan.time->seconds / seconds, 1, kSeconds) << name << ": " << step.name;
      EXPECT_TRUE(plan.fits()) << name << ": " << step.name;
      const MemoryPurposes& m = plan.fullest().memory;
      const json& memory = measured.at("memory");
      EXPECT_EQ(m.weights + m.gradients, memory.at("parameters_bytes").get<double>()) << step.name;
      EXPECT_EQ(m.optimizer, memory.at("optimizer_bytes").get<double>()) << step.name;
      EXPECT_NEAR(m.workspace / memory.at("scratch_peak_bytes").get<double>(), 1, kMemory) << step.name;
      ++compared;
    }
  }
  return compared;
}

TEST(PlanRecords, H200) {
  EXPECT_GE(compare("h200-sxm", "h200"), 7);
}

TEST(PlanRecords, H100) {
  EXPECT_GE(compare("h100-sxm", "h100_80gb_hbm3"), 4);
}

// 20 of the 24 layers did not fit there.
TEST(PlanRecords, WhatDidNotFitDoesNotFit) {
  const Step step{"largest_20_layers", 20, 8192, Recompute::kRoutedUp};
  const Machine h100 = read_machine(fs::path(UPMOE_SOURCE_DIR) / "configs/machines/h100-sxm.yaml");
  EXPECT_FALSE(plan_run(run_of(step), model_of(step), 1, h100).fits());
}

}  // namespace
}  // namespace upmoe

// The learning rate of every schedule: its values, and that no step jumps.

#include "trainer/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace upmoe {
namespace {

RunConfig schedule(ScheduleKind kind, std::int64_t steps, std::int64_t warmup, double ratio = 0.1,
                   double decay = 0.1) {
  RunConfig run;
  run.optimizer.lr = 2.0;
  run.schedule = {kind, warmup, ratio, decay};
  run.train.steps = steps;
  return run;
}

TEST(Schedule, ValuesOfCosine) {
  const RunConfig run = schedule(ScheduleKind::kCosine, 100, 20);
  EXPECT_DOUBLE_EQ(learning_rate(run, 1), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(run, 20), 2.0);
  EXPECT_NEAR(learning_rate(run, 40), 0.2 + 1.8 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);  // a quarter
  EXPECT_NEAR(learning_rate(run, 60), 1.1, 1e-12);                                     // half the way
  EXPECT_NEAR(learning_rate(run, 100), 0.2, 1e-12);
}

TEST(Schedule, ValuesOfWsd) {
  const RunConfig run = schedule(ScheduleKind::kWsd, 100, 20, 0.1, 0.4);
  EXPECT_DOUBLE_EQ(learning_rate(run, 10), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(run, 20), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(run, 60), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(run, 80), 1.1);
  EXPECT_DOUBLE_EQ(learning_rate(run, 100), 0.2);
  // What does not fit behind the warm-up takes what is left.
  const RunConfig tight = schedule(ScheduleKind::kWsd, 10, 6, 0.5, 0.9);
  EXPECT_DOUBLE_EQ(learning_rate(tight, 6), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(tight, 8), 1.5);
  EXPECT_DOUBLE_EQ(learning_rate(tight, 10), 1.0);
}

TEST(Schedule, ConstantAndRunsWithinTheWarmUp) {
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleKind::kConstant, 100, 0), 77), 2.0);
  for (const auto& [kind, name] : kNames<ScheduleKind>.built)
    for (const std::int64_t step : {1, 5, 10})
      EXPECT_DOUBLE_EQ(learning_rate(schedule(kind, 10, 40), step),
                       learning_rate(schedule(kind, 1000, 40), step))
          << name;
}

// No step is further from its neighbour than the steepest of the rise and the fall allows.
TEST(Schedule, NoneJumps) {
  for (const auto& [kind, name] : kNames<ScheduleKind>.built)
    for (const std::int64_t steps : {1, 2, 3, 10, 50})
      for (const std::int64_t warmup : {0, 1, 2, 5, 9, 10, 20, 49, 50, 80})
        for (const double decay : {0.01, 0.1, 0.5, 0.9, 1.0})
          for (const double ratio : {0.0, 0.1, 1.0}) {
            const RunConfig run = schedule(kind, steps, warmup, ratio, decay);
            const double lr = run.optimizer.lr, fall = lr * (1 - ratio);
            const auto rest = static_cast<double>(std::max<std::int64_t>(1, steps - warmup));
            const double taken =
                std::max(1.0, std::min(rest, std::round(decay * static_cast<double>(steps))));
            const double steepest =
                std::max(warmup > 0 ? lr / static_cast<double>(warmup) : 0.0,
                         kind == ScheduleKind::kCosine ? fall * std::numbers::pi / 2 / rest : fall / taken);
            for (std::int64_t step = warmup > 0 ? 0 : 1; step < steps; ++step)
              EXPECT_LE(std::abs(learning_rate(run, step + 1) - learning_rate(run, step)), steepest + 1e-9)
                  << name << " steps " << steps << " warmup " << warmup << " decay " << decay << " at "
                  << step;
          }
}

}  // namespace
}  // namespace upmoe

#pragma once
// Learning rate by step; steps count from 1. Warm-up is linear: lr * step / warmup.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "configs/run_config.h"

namespace upmoe {

// cosine: half a cosine from lr to lr * min_lr_ratio at the last step. constant: lr. wsd: lr, then linear to
// lr * min_lr_ratio over the last decay_fraction of the steps, or over what the warm-up leaves of them. A run
// that ends within its warm-up is the beginning of a longer one. No schedule jumps. `lr`: of a group of parameters.
inline double learning_rate(const RunConfig& run, std::int64_t step, double lr) {
  const double floor = lr * run.schedule.min_lr_ratio;
  const double s = static_cast<double>(step), warmup = static_cast<double>(run.schedule.warmup);
  const double last = static_cast<double>(run.train.steps);
  if (s <= warmup) return lr * s / warmup;
  if (run.schedule.name == ScheduleKind::kConstant) return lr;
  if (run.schedule.name == ScheduleKind::kWsd) {
    const double wished = std::max(1.0, std::round(run.schedule.decay_fraction * last));
    const double decay = std::max(1.0, std::min(wished, last - warmup));
    const double left = std::max(0.0, last - s);
    return left >= decay ? lr : floor + (lr - floor) * left / decay;
  }
  const double progress = last > warmup ? std::min(1.0, (s - warmup) / (last - warmup)) : 1.0;
  return floor + (lr - floor) * 0.5 * (1.0 + std::cos(3.14159265358979323846 * progress));
}
inline double learning_rate(const RunConfig& run, std::int64_t step) {
  return learning_rate(run, step, run.optimizer.lr);
}
// Of what is in no group, then of each of optimizer.groups.
inline std::vector<double> learning_rates(const RunConfig& run, std::int64_t step) {
  std::vector<double> rates{learning_rate(run, step)};
  for (const OptimizerGroup& group : run.optimizer.groups)
    rates.push_back(learning_rate(run, step, group.lr.value_or(run.optimizer.lr)));
  return rates;
}

}  // namespace upmoe

#include "kernels/ops/balance.h"

#include <algorithm>

#include "kernels/ops/backend.h"
#include "kernels/ops/balance_formulas.h"

namespace upmoe::cpu {

void add_sums(Exec&, TensorView sum_n, ConstTensorView x_n) {
  auto* sum = sum_n.as<double>();
  for (std::int64_t i = 0; i < sum_n.elements(); ++i) sum[i] += x_n.as<double>()[i];
}

void pool_loads(Exec&, TensorView pool_2E, TensorView assigned_ME, ConstTensorView loads_ML,
                Accumulate mode) {
  const std::int64_t E = pool_2E.elements() / 2;
  auto *pool = pool_2E.as<double>(), *assigned = assigned_ME.if_given<double>();
  if (mode == Accumulate::kOverwrite) std::fill_n(pool, 2 * E, 0.0);
  for (std::int64_t m = 0; m < loads_ML.shape[0]; ++m) {
    const double* load = loads_ML.as<double>() + m * loads_ML.shape[1];
    for (std::int64_t e = 0; e < E; ++e) {
      pool[e] += load[e];
      pool[E + e] += load[2 * E + e];
      if (assigned != nullptr) assigned[m * E + e] += load[e];
    }
  }
}

void balance_gradients(Exec&, const BalanceGradients& gradients, TensorView values_V,
                       const BalanceCounts& counts, const BalanceRule& rule) {
  const std::int64_t M = counts.loads_ML.shape[0], E = rule.row.experts,
                     rows = std::max<std::int64_t>(1, rule.row.sequences);
  const auto counts_at = [&](std::int64_t m) {
    return counts_of(counts.loads_ML.as<double>(), counts.pool_2E.as<double>(),
                     counts.previous_ME.if_given<float>(), m, rule);
  };
  auto *probability = gradients.probability_ME.as<float>(), *weight = gradients.weight_ME.if_given<float>(),
       *chance = gradients.chance_ME.if_given<float>();
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t b = 0; b < rows; ++b)
      for (std::int64_t e = 0; e < E; ++e)
        probability[(m * rows + b) * E + e] = balance_gradient(counts_at(m), b, e, rule);
    for (std::int64_t e = 0; weight != nullptr && e < E; ++e)
      weight[m * E + e] = variation_gradient(BalanceForm::kWeightVariation, counts_at(m), e, rule);
    for (std::int64_t e = 0; chance != nullptr && e < E; ++e)
      chance[m * E + e] = variation_gradient(BalanceForm::kChanceVariation, counts_at(m), e, rule);
  }
  for (int i = 0; values_V.given() && i < value_count(rule); ++i)
    values_V.as<double>()[i] += sum_of_mixtures(i, M, counts_at(0), rule, [&](std::int64_t m, int at) {
      return mixture_value(at, counts_at(m), rule);
    });
}

}  // namespace upmoe::cpu

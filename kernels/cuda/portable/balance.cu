// What is left of a router's balance between forward and backward: a few thousand numbers, and no host.

#include "kernels/ops/balance.h"

#include <algorithm>

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/balance_formulas.h"

namespace upmoe::cuda {

namespace {

__global__ void add_sums_kernel(double* sum, const double* x, std::int64_t n) {
  const std::int64_t i = global_thread();
  if (i < n) sum[i] += x[i];
}

// A thread for each expert goes through the mixtures in their order.
__global__ void pool_kernel(double* pool, double* assigned, const double* loads, std::int64_t mixtures,
                            std::int64_t width, std::int64_t experts, bool overwrite) {
  const std::int64_t e = global_thread();
  if (e >= experts) return;
  double assignments = overwrite ? 0.0 : pool[e], probability = overwrite ? 0.0 : pool[experts + e];
  for (std::int64_t m = 0; m < mixtures; ++m) {
    const double* load = loads + m * width;
    assignments += load[e];
    probability += load[2 * experts + e];
    if (assigned != nullptr) assigned[m * experts + e] += load[e];
  }
  pool[e] = assignments;
  pool[experts + e] = probability;
}

struct BalanceInputs {
  const double *loads, *pool;
  const float* previous;
  BalanceRule rule;
  __device__ MixtureLoad mixture(std::int64_t m) const { return counts_of(loads, pool, previous, m, rule); }
};

struct BalanceOutputs {
  float *probability, *weight, *chance;  // the last two null where they are not counted
};

// A block for each mixture; value[m] is what it adds to the values.
__global__ void gradient_kernel(BalanceOutputs out, double* value, BalanceInputs in, int rows) {
  const std::int64_t m = blockIdx.x, experts = in.rule.row.experts, entries = rows * experts;
  const MixtureLoad counts = in.mixture(m);
  for (std::int64_t i = threadIdx.x; i < entries; i += blockDim.x)
    out.probability[m * entries + i] = balance_gradient(counts, i / experts, i % experts, in.rule);
  for (std::int64_t e = threadIdx.x; e < experts; e += blockDim.x) {
    if (out.weight != nullptr)
      out.weight[m * experts + e] = variation_gradient(BalanceForm::kWeightVariation, counts, e, in.rule);
    if (out.chance != nullptr)
      out.chance[m * experts + e] = variation_gradient(BalanceForm::kChanceVariation, counts, e, in.rule);
  }
  const int i = static_cast<int>(threadIdx.x);
  if (i < value_count(in.rule)) value[m * value_count(in.rule) + i] = mixture_value(i, counts, in.rule);
}

__global__ void value_kernel(double* values, const double* of_mixtures, BalanceInputs in,
                             std::int64_t mixtures) {
  const int i = static_cast<int>(threadIdx.x), places = value_count(in.rule);
  if (i >= places) return;
  values[i] += sum_of_mixtures(i, mixtures, in.mixture(0), in.rule,
                               [&](std::int64_t m, int at) { return of_mixtures[m * places + at]; });
}

}  // namespace

void add_sums(Exec& ex, TensorView sum_n, ConstTensorView x_n) {
  launch(ex, blocks_for(sum_n.elements(), kThreads), kThreads, add_sums_kernel, sum_n.as<double>(),
         x_n.as<double>(), sum_n.elements());
}

void pool_loads(Exec& ex, TensorView pool_2E, TensorView assigned_ME, ConstTensorView loads_ML,
                Accumulate mode) {
  const std::int64_t experts = pool_2E.elements() / 2;
  launch(ex, blocks_for(experts, kThreads), kThreads, pool_kernel, pool_2E.as<double>(),
         assigned_ME.if_given<double>(), loads_ML.as<double>(), loads_ML.shape[0], loads_ML.shape[1], experts,
         mode == Accumulate::kOverwrite);
}

void balance_gradients(Exec& ex, const BalanceGradients& gradients, TensorView values_V,
                       const BalanceCounts& counts, const BalanceRule& rule) {
  const std::int64_t mixtures = counts.loads_ML.shape[0];
  const auto rows = static_cast<int>(std::max<std::int64_t>(1, rule.row.sequences));
  ScratchScope scope(*ex.scratch);
  const TensorView of_mixtures =
      ex.scratch->take({mixtures, value_count(rule)}, DType::kF64, "balance terms of mixtures");
  const BalanceInputs in{counts.loads_ML.as<double>(), counts.pool_2E.as<double>(),
                         counts.previous_ME.if_given<float>(), rule};
  const BalanceOutputs out{gradients.probability_ME.as<float>(), gradients.weight_ME.if_given<float>(),
                           gradients.chance_ME.if_given<float>()};
  launch(ex, static_cast<unsigned>(mixtures), kThreads, gradient_kernel, out, of_mixtures.as<double>(), in,
         rows);
  if (values_V.given())
    launch(ex, 1, kWarp, value_kernel, values_V.as<double>(), of_mixtures.as<double>(), in, mixtures);
}

}  // namespace upmoe::cuda

#pragma once
// Values and gradients of balance terms from counts on the host, by the ops of the test device.

#include <algorithm>
#include <vector>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "trainer/model/balance.h"

namespace upmoe::test {

struct CountedMixture {
  std::vector<double> loads_L;  // as kernels/ops/balance.h has them
  std::vector<double> previous_E = {};
};

struct BalanceOf {
  double z = 0, lost = 0;
  std::vector<double> aux;                                           // of each term, before its coefficient
  std::vector<std::vector<float>> gradient;                          // of each mixture: [E], or [B, E]
  std::vector<std::vector<float>> weight_gradient, chance_gradient;  // [E]; empty where they are not counted
};

// Mixture by mixture.
inline std::vector<std::vector<float>> rows_of_mixtures(const HostTensor& all, std::int64_t mixtures) {
  const std::vector<double> values = all.values();
  const auto each = static_cast<std::ptrdiff_t>(values.size()) / mixtures;
  std::vector<std::vector<float>> rows;
  for (auto begin = values.begin(); begin != values.end(); begin += each)
    rows.emplace_back(begin, begin + each);
  return rows;
}

inline BalanceOf balance_of(const BalanceConfig& config, const BalanceSizes& sizes,
                            const std::vector<CountedMixture>& mixtures) {
  OpExec ex;
  const auto M = static_cast<std::int64_t>(mixtures.size());
  const std::int64_t E = sizes.row.experts, rows = std::max<std::int64_t>(1, sizes.row.sequences),
                     terms = static_cast<std::int64_t>(config.terms.size());
  std::vector<double> loads, previous;
  for (const CountedMixture& m : mixtures) {
    loads.insert(loads.end(), m.loads_L.begin(), m.loads_L.end());
    previous.insert(previous.end(), m.previous_E.begin(), m.previous_E.end());
  }
  const HostTensor loads_ML = tensor_of({M, sizes.row.size()}, DType::kF64, loads);
  HostTensor pool_2E = filled({2 * E}, DType::kF64, 99), aux_ME = filled({M * rows, E}, DType::kF32, 99),
             weight_ME = filled({M, E}, DType::kF32, 99), chance_ME = filled({M, E}, DType::kF32, 99),
             values_V = filled({2 + terms}, DType::kF64, 0);
  ops::pool_loads(ex, pool_2E, {}, loads_ML, Accumulate::kOverwrite);
  BalanceCounts counts{loads_ML, pool_2E};
  HostTensor previous_ME({M, E}, DType::kF32);
  if (!previous.empty()) {
    previous_ME = tensor_of({M, E}, DType::kF32, previous);
    counts.previous_ME = previous_ME;
  }
  BalanceGradients gradients{aux_ME};
  if (sizes.row.weights) gradients.weight_ME = weight_ME;
  if (sizes.row.chances) gradients.chance_ME = chance_ME;
  ops::balance_gradients(ex, gradients, values_V, counts, rule_of(config, sizes, true));
  finish_ops();
  BalanceOf found;
  const std::vector<double> values = values_V.values();
  found.z = values[0];
  found.lost = values[1];
  found.aux.assign(values.begin() + 2, values.end());
  found.gradient = rows_of_mixtures(aux_ME, M);
  if (sizes.row.weights) found.weight_gradient = rows_of_mixtures(weight_ME, M);
  if (sizes.row.chances) found.chance_gradient = rows_of_mixtures(chance_ME, M);
  return found;
}

}  // namespace upmoe::test

#pragma once
// Rows routed to experts, with operands of every product of theirs: for the tests of kernels that are fused
// more than an op is.

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/core/bf16.h"

namespace upmoe {

struct RoutedRows {
  int experts = 0, width = 0, neurons = 0, tokens = 0, rows = 0;  // E, D, F, T, R
  std::vector<int> token_R, offsets_e1{0}, ranking_E;
  std::vector<float> weight_R;
  std::vector<bf16> x_TD, dout_TD, gate_up_EG_D, down_ED_F, gate_up_RG, hidden_RF, dgate_up_RG;

  int token(int row) const { return token_R[static_cast<std::size_t>(row)]; }
  int expert(int row) const {
    int e = 0;
    while (offsets_e1[static_cast<std::size_t>(e) + 1] <= row) ++e;
    return e;
  }
};

inline std::vector<bf16> random_values(std::mt19937_64& random, std::size_t n) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<bf16> values(n);
  for (bf16& v : values) v = to_bf16(uniform(random));
  return values;
}

// Experts with so many rows each, drawn from tokens at random.
inline RoutedRows make_routed_rows(std::mt19937_64& random, const std::vector<int>& rows_of_expert, int width,
                                   int neurons) {
  RoutedRows p;
  p.experts = static_cast<int>(rows_of_expert.size());
  p.width = width;
  p.neurons = neurons;
  for (int rows : rows_of_expert) {
    p.offsets_e1.push_back(p.offsets_e1.back() + rows);
    p.ranking_E.push_back(static_cast<int>(p.ranking_E.size()));
  }
  std::stable_sort(p.ranking_E.begin(), p.ranking_E.end(), [&](int a, int b) {
    return rows_of_expert[static_cast<std::size_t>(a)] > rows_of_expert[static_cast<std::size_t>(b)];
  });
  p.rows = p.offsets_e1.back();
  p.tokens = p.rows / 2 + 2;
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int r = 0; r < p.rows; ++r) {
    p.token_R.push_back(static_cast<int>(random() % static_cast<unsigned>(p.tokens)));
    p.weight_R.push_back(uniform(random));
  }
  const auto e = static_cast<std::size_t>(p.experts), d = static_cast<std::size_t>(width),
             f = static_cast<std::size_t>(neurons), r = static_cast<std::size_t>(p.rows),
             t = static_cast<std::size_t>(p.tokens);
  p.x_TD = random_values(random, t * d);
  p.dout_TD = random_values(random, t * d);
  p.gate_up_EG_D = random_values(random, e * 2 * f * d);
  p.down_ED_F = random_values(random, e * d * f);
  p.gate_up_RG = random_values(random, r * 2 * f);
  p.hidden_RF = random_values(random, r * f);
  p.dgate_up_RG = random_values(random, r * 2 * f);
  return p;
}

}  // namespace upmoe

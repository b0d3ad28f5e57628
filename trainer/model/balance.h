#pragma once
// Router balance terms of one micro-batch, over all ranks that share its tokens and all chunks of a pipeline:
// value and gradient from the sums that ops::balance_stats takes. E experts, k choices of each of N tokens, c_e
// assignments of e, P_e = mean probability (of sigmoid scores: s_e over the sum of all):
//
//   kHf        E * sum_e f_e P_e over the pool of all MoE layers' tokens; f_e = assignments of e (all k) / pool;
//              transformers' load_balancing_loss_func; balanced value k
//   the others layer by layer, and summed over layers:
//   kSwitch    E * sum_e f_e P_e with f_e = share of tokens whose first choice is e (Fedus et al. 2021); balanced 1
//   kGShard    the same / E^2 (Lepikhin et al. 2020, Algorithm 1)
//   kSequence  mean over the micro-batch's sequences, each by itself, of sum_e (E c_e / (k S)) P_e (DeepSeek-V2, V3);
//              balanced 1
//   kGroup     sum over groups of experts of (mean of E c_e / (k N)) * (sum of P_e) (DeepSeekMoE's device-level loss);
//              groups are the configuration's, whatever ranks there are; balanced 1
//   kGlobal    E * sum_e f_e P_e with f_e = share of e in all assignments of the step before, 0 in the first step;
//              balanced 1. Loads of micro-batches so far would depend on the layout; these do not.
//   kImportance  CV^2 of the sums of the experts' weights over all tokens (Shazeer et al. 2017); balanced 0
//   kLoad      CV^2 of the sums of their chances to be chosen, of noisy routers (the same); balanced 0
//              CV^2 of E numbers: their variance / (their mean^2 + 1e-10)
//   z          mean of logsumexp(logits)^2 (Zoph et al. 2022)
// f is a constant for the gradient.

#include <vector>

#include "configs/run_choices.h"
#include "kernels/ops/balance.h"
#include "kernels/ops/routing.h"
#include "trainer/model/routed_tokens.h"

namespace upmoe {

struct AuxTerm {
  AuxKind kind = AuxKind::kHf;
  double coefficient = 0;  // already divided by the number of micro-batches of the step
};

struct BalanceConfig {
  std::vector<AuxTerm> terms;
  double z_coefficient = 0;  // divided likewise
  int groups = 1;            // of kGroup
  // kGlobal: of every block of the model each expert's share, [E] of fp32; absent where it is no mixture of this rank.
  std::vector<ConstTensorView> previous;
  bool has(AuxKind kind) const;  // with a coefficient
};

// What one mixture's router counts over a micro-batch, on the device: the sums of ops::balance_stats and, where there
// are sequences to count by, those of ops::row_balance_stats, together.
struct RouterLoad {
  TensorView sums_L;                // fp64
  std::int64_t sequences = 0;       // B; 0: not counted by sequence
  ConstTensorView sequence_t = {};  // of this rank's tokens: which one it is of, int32
  TensorView lost_1 = {};  // fp64, 0 at first: choices that no expert took; given where some may be lost
  // fp64: sums for kImportance and kLoad, given where they are wanted.
  TensorView weight_E = {}, chance_E = {};
  static std::int64_t size(std::int64_t experts, std::int64_t sequences = 0) {  // L
    return LoadRow{experts, sequences}.size();
  }
  explicit operator bool() const { return sums_L.shape.rank > 0; }
  std::int64_t experts() const { return sums_L.elements() / (3 + 2 * sequences); }
  TensorView stats_3E() const { return sums_L.rows(0, 3 * experts()).reshape({3, experts()}); }
  TensorView stats_2BE() const {
    return sums_L.rows(3 * experts(), sums_L.elements() - 1).reshape({2, sequences, experts()});
  }
  TensorView z_1() const { return sums_L.rows(sums_L.elements() - 1, sums_L.elements()); }
  void count(Exec& ex, const Routes& routes) const;
};

// One mixture's part in the balance terms of a micro-batch, and what its router knows of the tokens. The model sets
// `load` (without one nothing is counted), `tokens` and `groups` before forward, the gradients between forward and
// backward.
struct RouterBalance {
  RouterLoad load;
  RoutedTokens tokens;
  RoutedGroups groups;
  TermGradient terms;
  // Of kImportance and kLoad, where they are: d(term) / d(sum of an expert's weights, of its chances), fp32.
  ConstTensorView weight_gradient_E = {}, chance_gradient_E = {};
  // The gradient of the choices' weights with that of kImportance; in the caller's ScratchScope.
  ConstTensorView with_weight_gradient(Exec& ex, ConstTensorView dweight_TK, ConstTensorView index_TK) const;
};

// What a micro-batch counts, for its terms.
struct BalanceSizes {
  std::int64_t tokens = 0;    // over all ranks that share the micro-batch
  std::int64_t mixtures = 0;  // of the whole model
  LoadRow row;                // of each of them
};
// The terms as ops::balance_gradients takes them; `counts_pool`: this rank's chunk is the one that counts the value of
// kHf.
BalanceRule rule_of(const BalanceConfig& config, const BalanceSizes& sizes, bool counts_pool);
// d(z_coefficient * z) / d(lse^2) of one token.
float z_scale_of(const BalanceConfig& config, std::int64_t tokens);

}  // namespace upmoe

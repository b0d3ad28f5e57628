#pragma once
// The balance terms of routers, from what was counted (routing.h: balance_stats, row_balance_stats, sum_by_expert) to
// their values and gradients, all on the device.

#include <cstdint>

#include "kernels/core/exec.h"

namespace upmoe {

// A mixture's counts are one row of fp64 values, L of them with B sequences that are counted by themselves, or none:
//
//   assignments of each expert | first choices | sums of probabilities | assignments [B, E] | probabilities [B, E] | z
//
// and then, where they are counted: assignments that no expert took (one value), each expert's sum of weights, its sum
// of chances.
struct LoadRow {
  std::int64_t experts = 0, sequences = 0;
  bool lost = false, weights = false, chances = false;
  constexpr std::int64_t z_at() const { return (3 + 2 * sequences) * experts; }
  constexpr std::int64_t lost_at() const { return z_at() + 1; }
  constexpr std::int64_t weights_at() const { return lost_at() + (lost ? 1 : 0); }
  constexpr std::int64_t chances_at() const { return weights_at() + (weights ? experts : 0); }
  constexpr std::int64_t size() const { return chances_at() + (chances ? experts : 0); }  // L
};

// All but the last two are the sum of factor * f_e P_e over the experts e, P_e the mean probability; f is a constant
// for the gradient. The last two are CV^2 of E sums, their variance / (their mean^2 + 1e-10), whatever the factor.
enum class BalanceForm : std::uint8_t {
  kPooled,           // share of the pool's tokens (all mixtures together) that chose e, P of the pool
  kFirstChoice,      // share of the tokens whose first choice is e
  kShares,           // as it is given
  kGroups,           // mean over the group of e of E c_e / (all c); groups are runs of equal length
  kSequences,        // E c_e / (all c) of each sequence with its own P; the mean over sequences
  kWeightVariation,  // of the sums of weights
  kChanceVariation,  // of the sums of chances
};

struct BalanceTerm {
  BalanceForm form = BalanceForm::kPooled;
  double factor = 1, coefficient = 0;  // the gradient is the coefficient's, the value is without it
};

constexpr int kMostBalanceTerms = 8;

// Of a micro-batch.
struct BalanceRule {
  std::int64_t tokens = 0, pool_tokens = 0;  // of one mixture; of all of them
  LoadRow row;
  int groups = 1, terms = 0;
  bool counts_pool = false;  // the value of kPooled is counted here: once for a whole model
  BalanceTerm term[kMostBalanceTerms];
};

struct BalanceCounts {
  ConstTensorView loads_ML, pool_2E;  // fp64; the pool: assignments, then probabilities
  ConstTensorView previous_ME = {};   // fp32; of kShares, else absent
};

// fp32, overwritten: d(sum of coefficient * term) / d(what they are named by) of any expert.
struct BalanceGradients {
  TensorView probability_ME;  // of any token; with sequences [M * B, E], of the tokens of each
  TensorView weight_ME = {}, chance_ME = {};  // of the sums; given where they are counted
};

namespace ops {

// sum_n += x_n; fp64.
void add_sums(Exec& ex, TensorView sum_n, ConstTensorView x_n);

// The mixtures' counts to the pool, one after the other (kOverwrite: they are its first), and, where it is given,
// assigned_ME += their assignments.
void pool_loads(Exec& ex, TensorView pool_2E, TensorView assigned_ME, ConstTensorView loads_ML,
                Accumulate mode);

// Where values_V is given (fp64, two more than terms): its first += the mixtures' sums of z / tokens, its second +=
// what they lost, the others += the terms.
void balance_gradients(Exec& ex, const BalanceGradients& gradients, TensorView values_V,
                       const BalanceCounts& counts, const BalanceRule& rule);

}  // namespace ops

}  // namespace upmoe

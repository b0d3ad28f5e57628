#include "trainer/model/balance.h"

#include <algorithm>

#include "kernels/ops/noisy_routing.h"

namespace upmoe {

bool BalanceConfig::has(AuxKind kind) const {
  return std::any_of(terms.begin(), terms.end(),
                     [&](const AuxTerm& t) { return t.kind == kind && t.coefficient != 0; });
}

void RouterLoad::count(Exec& ex, const Routes& routes) const {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  ops::balance_stats(ex, stats_3E(), z_1(), probs_TE, index_TK, lse_T);
  if (sequences > 0) ops::row_balance_stats(ex, stats_2BE(), probs_TE, index_TK, sequence_t);
  if (weight_E.given()) ops::sum_by_expert(ex, weight_E, weight_TK, index_TK);
}

ConstTensorView RouterBalance::with_weight_gradient(Exec& ex, ConstTensorView dweight_TK,
                                                    ConstTensorView index_TK) const {
  if (!weight_gradient_E.given()) return dweight_TK;
  const TensorView sum_TK =
      ex.scratch->take(dweight_TK.shape, DType::kF32, "router weights' gradient with importance");
  ops::add_by_expert(ex, sum_TK, dweight_TK, weight_gradient_E, index_TK);
  return sum_TK;
}

namespace {

// In the forms of kernels/ops/balance.h, of E experts. Without a coefficient the pool's is a figure to watch; what the
// others are made of need not have been counted.
BalanceTerm term_of(const AuxTerm& term, double E) {
  if (term.coefficient == 0 && term.kind != AuxKind::kHf) return {BalanceForm::kPooled, 0, 0};
  switch (term.kind) {
    case AuxKind::kHf:
      return {BalanceForm::kPooled, E, term.coefficient};
    case AuxKind::kSwitch:
      return {BalanceForm::kFirstChoice, E, term.coefficient};
    case AuxKind::kGShard:
      return {BalanceForm::kFirstChoice, 1 / E, term.coefficient};
    case AuxKind::kGlobal:
      return {BalanceForm::kShares, E, term.coefficient};
    case AuxKind::kGroup:
      return {BalanceForm::kGroups, 1, term.coefficient};
    case AuxKind::kSequence:
      return {BalanceForm::kSequences, 1, term.coefficient};
    case AuxKind::kImportance:
      return {BalanceForm::kWeightVariation, 1, term.coefficient};
    case AuxKind::kLoad:
      return {BalanceForm::kChanceVariation, 1, term.coefficient};
  }
  fail(ExitCode::kFailure, "there is no such balance term");
}

}  // namespace

BalanceRule rule_of(const BalanceConfig& config, const BalanceSizes& sizes, bool counts_pool) {
  UPMOE_CHECK(config.terms.size() <= std::size_t{kMostBalanceTerms}, "{} balance terms, at most {}",
              config.terms.size(), kMostBalanceTerms);
  BalanceRule rule{.tokens = sizes.tokens,
                   .pool_tokens = checked_mul(sizes.tokens, sizes.mixtures),
                   .row = sizes.row,
                   .groups = config.has(AuxKind::kGroup) ? config.groups : 1,
                   .terms = static_cast<int>(config.terms.size()),
                   .counts_pool = counts_pool,
                   .term = {}};
  for (std::size_t i = 0; i < config.terms.size(); ++i)
    rule.term[i] = term_of(config.terms[i], static_cast<double>(sizes.row.experts));
  return rule;
}

float z_scale_of(const BalanceConfig& config, std::int64_t tokens) {
  return tokens == 0 ? 0.0f : static_cast<float>(config.z_coefficient / static_cast<double>(tokens));
}

}  // namespace upmoe

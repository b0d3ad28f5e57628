#include "kernels/ops/balance.h"

#include <algorithm>

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

double count_of(const ConstTensorView& t) {
  return static_cast<double>(t.elements());
}

void check_rule(const BalanceRule& r, std::source_location where) {
  if (r.tokens < 1 || r.pool_tokens < r.tokens || r.row.experts < 1 || r.row.sequences < 0 || r.terms < 0 ||
      r.terms > kMostBalanceTerms || r.groups < 1 || r.row.experts % r.groups != 0)
    fail_check("a rule of balance terms", where,
               fmt::format("{} tokens of {}, {} experts in {} groups, {} sequences, {} terms", r.tokens,
                           r.pool_tokens, r.row.experts, r.groups, r.row.sequences, r.terms));
}

bool has(const BalanceRule& r, BalanceForm form) {
  return std::any_of(r.term, r.term + r.terms, [&](const BalanceTerm& t) { return t.form == form; });
}

}  // namespace

void add_sums(Exec& ex, TensorView sum_n, ConstTensorView x_n) {
  check_tensor(ex, sum_n, {sum_n.elements()}, DType::kF64, "sum_n");
  check_tensor(ex, x_n, sum_n.shape, DType::kF64, "x_n");
  ex.book("add_sums", count_of(x_n), 2 * bytes_of(x_n), bytes_of(sum_n));
  dispatch(ex, &Backend::add_sums, sum_n, x_n);
}

void pool_loads(Exec& ex, TensorView pool_2E, TensorView assigned_ME, ConstTensorView loads_ML,
                Accumulate mode) {
  UPMOE_CHECK(loads_ML.shape.rank == 2 && pool_2E.elements() % 2 == 0, "loads_ML {}, pool_2E {}",
              loads_ML.shape.str(), pool_2E.shape.str());
  const std::int64_t M = loads_ML.shape[0], E = pool_2E.elements() / 2;
  check_tensor(ex, pool_2E, {2 * E}, DType::kF64, "pool_2E");
  check_tensor(ex, loads_ML, loads_ML.shape, DType::kF64, "loads_ML");
  UPMOE_CHECK(M == 0 || loads_ML.shape[1] > 3 * E, "loads_ML {} of {} experts", loads_ML.shape.str(), E);
  if (assigned_ME.given()) check_tensor(ex, assigned_ME, {M, E}, DType::kF64, "assigned_ME");
  const double counts = static_cast<double>(M * E);
  ex.book("pool_loads", 3 * counts, 16 * counts, bytes_of(pool_2E) + 8 * counts);
  dispatch(ex, &Backend::pool_loads, pool_2E, assigned_ME, loads_ML, mode);
}

void balance_gradients(Exec& ex, const BalanceGradients& gradients, TensorView values_V,
                       const BalanceCounts& counts, const BalanceRule& rule) {
  check_scratch(ex);
  check_rule(rule, std::source_location::current());
  const auto& [loads_ML, pool_2E, previous_ME] = counts;
  const auto& [probability_ME, weight_ME, chance_ME] = gradients;
  UPMOE_CHECK(loads_ML.shape.rank == 2, "loads_ML {}", loads_ML.shape.str());
  const std::int64_t M = loads_ML.shape[0], E = rule.row.experts, B = rule.row.sequences;
  check_tensor(ex, probability_ME, {M * std::max<std::int64_t>(1, B), E}, DType::kF32, "probability_ME");
  if (M > 0) check_tensor(ex, loads_ML, {M, rule.row.size()}, DType::kF64, "loads_ML");
  check_tensor(ex, pool_2E, {2 * E}, DType::kF64, "pool_2E");
  if (has(rule, BalanceForm::kShares)) check_tensor(ex, previous_ME, {M, E}, DType::kF32, "previous_ME");
  UPMOE_CHECK(M == 0 || B > 0 || !has(rule, BalanceForm::kSequences),
              "a term by sequence, and none was counted");
  UPMOE_CHECK(M == 0 || rule.row.weights || !has(rule, BalanceForm::kWeightVariation),
              "a term of the sums of weights, and none were counted");
  UPMOE_CHECK(M == 0 || rule.row.chances || !has(rule, BalanceForm::kChanceVariation),
              "a term of the sums of chances, and none were counted");
  if (rule.row.weights) check_tensor(ex, weight_ME, {M, E}, DType::kF32, "weight_ME");
  if (rule.row.chances) check_tensor(ex, chance_ME, {M, E}, DType::kF32, "chance_ME");
  if (values_V.given()) check_tensor(ex, values_V, {2 + rule.terms}, DType::kF64, "values_V");
  ex.book("balance_gradients", 4.0 * static_cast<double>(rule.terms) * count_of(probability_ME),
          bytes_of(loads_ML) + bytes_of(pool_2E),
          bytes_of(probability_ME) + (rule.row.weights ? bytes_of(weight_ME) : 0) +
              (rule.row.chances ? bytes_of(chance_ME) : 0));
  dispatch(ex, &Backend::balance_gradients, gradients, values_V, counts, rule);
}

}  // namespace upmoe::ops

#include "kernels/ops/sigmoid_routing.h"

#include "kernels/core/expert_groups.h"
#include "kernels/ops/check_terms.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_rule(const SigmoidRule& rule, const Shape& logits, const Shape& index,
                std::source_location where = std::source_location::current()) {
  const bool ranks = logits.rank == 2 && index.rank == 2;
  if (!ranks || index[0] != logits[0] || index[1] < 1 || index[1] > logits[1])
    fail_check("1 <= K <= E", where, fmt::format("logits_TE {}, index_TK {}", logits.str(), index.str()));
  const std::int64_t experts = logits[1], groups = rule.groups;
  const bool grouped =
      groups == 1 ||
      (groups > 1 && groups <= kMostExpertGroups && experts % groups == 0 && experts >= 2 * groups &&
       rule.group_topk >= 1 && rule.group_topk <= groups && experts / groups * rule.group_topk >= index[1]);
  if (!grouped)
    fail_check("the groups hold what is chosen", where,
               fmt::format("{} experts in {} groups, {} of them for a top-{}", experts, groups,
                           rule.group_topk, index[1]));
}

}  // namespace

void route_sigmoid(Exec& ex, const SigmoidRoutes& out, ConstTensorView logits_TE, ConstTensorView bias_E,
                   const SigmoidRule& rule) {
  check_rule(rule, logits_TE.shape, out.index_TK.shape);
  check_tensor(ex, logits_TE, logits_TE.shape, DType::kF32, "logits_TE");
  check_tensor(ex, out.probs_TE, logits_TE.shape, DType::kF32, "probs_TE");
  check_tensor(ex, out.index_TK, out.index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, out.weight_TK, out.index_TK.shape, DType::kF32, "weight_TK");
  check_tensor(ex, out.lse_T, {logits_TE.shape[0]}, DType::kF32, "lse_T");
  if (bias_E.given()) check_tensor(ex, bias_E, {logits_TE.shape[1]}, DType::kF32, "bias_E");
  ex.book("route_sigmoid", 8.0 * static_cast<double>(logits_TE.elements()),
          bytes_of(logits_TE) + (bias_E.given() ? bytes_of(bias_E) : 0.0),
          bytes_of(out.probs_TE) + bytes_of(out.index_TK) + bytes_of(out.weight_TK) + bytes_of(out.lse_T));
  dispatch(ex, &Backend::route_sigmoid, out, logits_TE, bias_E, rule);
}

void route_sigmoid_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                            const TermGradient& terms, const SigmoidSaved& saved, const SigmoidRule& rule) {
  const auto& [logits_TE, index_TK, lse_T] = saved;
  check_rule(rule, logits_TE.shape, index_TK.shape);
  check_tensor(ex, logits_TE, logits_TE.shape, DType::kF32, "logits_TE");
  check_tensor(ex, dlogits_TE, logits_TE.shape, DType::kF32, "dlogits_TE");
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, dweight_TK, index_TK.shape, DType::kF32, "dweight_TK");
  check_tensor(ex, lse_T, {logits_TE.shape[0]}, DType::kF32, "lse_T");
  check_terms(ex, terms, logits_TE.shape[0], logits_TE.shape[1]);
  ex.book("route_sigmoid_backward", 12.0 * static_cast<double>(logits_TE.elements()),
          bytes_of(logits_TE) + bytes_of(index_TK) + bytes_of(dweight_TK) + bytes_of(terms) + bytes_of(lse_T),
          bytes_of(dlogits_TE));
  dispatch(ex, &Backend::route_sigmoid_backward, dlogits_TE, dweight_TK, terms, saved, rule);
}

}  // namespace upmoe::ops

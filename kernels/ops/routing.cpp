#include "kernels/ops/routing.h"

#include <limits>
#include <numeric>

#include "kernels/ops/check_terms.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

// probs [T, E] fp32; index [T, K] int32 with K <= E; lse [T] fp32.
void check_routes(const Exec& ex, const ConstTensorView& probs_TE, const ConstTensorView& index_TK,
                  const ConstTensorView& lse_T,
                  std::source_location where = std::source_location::current()) {
  const bool ranks = probs_TE.shape.rank == 2 && index_TK.shape.rank == 2;
  if (!ranks || index_TK.shape[1] < 1 || index_TK.shape[1] > probs_TE.shape[1])
    fail_check("1 <= K <= E", where,
               fmt::format("probs_TE {}, index_TK {}", probs_TE.shape.str(), index_TK.shape.str()));
  check_tensor(ex, probs_TE, probs_TE.shape, DType::kF32, "probs_TE", where);
  check_tensor(ex, index_TK, {probs_TE.shape[0], index_TK.shape[1]}, DType::kI32, "index_TK", where);
  check_tensor(ex, lse_T, {probs_TE.shape[0]}, DType::kF32, "lse_T", where);
}

// The elements of one row, over all dims but the first.
std::int64_t row_elements(const ConstTensorView& t) {
  std::int64_t n = 1;
  for (int i = 1; i < t.shape.rank; ++i) n = checked_mul(n, t.shape[i]);
  return n;
}

void check_onto(const Exec& ex, const SumOnto& onto, const TensorView& y_TD, DType row_dtype,
                std::source_location where = std::source_location::current()) {
  const auto& [base_TD, gate, residual_TD] = onto;
  if (base_TD.given()) check_tensor(ex, base_TD, y_TD.shape, y_TD.dtype, "base_TD", where);
  if (residual_TD.given()) check_tensor(ex, residual_TD, y_TD.shape, y_TD.dtype, "residual_TD", where);
  if (!gate.given()) return;
  if (!base_TD.given()) fail_check("a gate's gradient is added to a base", where, "base_TD is missing");
  check_tensor(ex, gate.dgate_T, {y_TD.shape[0]}, DType::kF32, "dgate_T", where);
  check_tensor(ex, gate.gate_T, {y_TD.shape[0]}, DType::kF32, "gate_T", where);
  check_tensor(ex, gate.w_1D, {1, y_TD.shape[1]}, row_dtype, "w_1D", where);
}

}  // namespace

void route_tokens(Exec& ex, TensorView probs_TE, TensorView index_TK, TensorView weight_TK, TensorView lse_T,
                  ConstTensorView logits_TE, bool renormalize) {
  check_routes(ex, probs_TE, index_TK, lse_T);
  check_tensor(ex, logits_TE, probs_TE.shape, DType::kF32, "logits_TE");
  check_tensor(ex, weight_TK, index_TK.shape, DType::kF32, "weight_TK");
  ex.book("route_tokens", 5.0 * static_cast<double>(probs_TE.elements()), bytes_of(logits_TE),
          bytes_of(probs_TE) + bytes_of(index_TK) + bytes_of(weight_TK) + bytes_of(lse_T));
  dispatch(ex, &Backend::route_tokens, probs_TE, index_TK, weight_TK, lse_T, logits_TE, renormalize);
}

void route_tokens_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                           const TermGradient& terms, const Routes& routes, bool renormalize) {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  check_routes(ex, probs_TE, index_TK, lse_T);
  check_tensor(ex, dlogits_TE, probs_TE.shape, DType::kF32, "dlogits_TE");
  check_tensor(ex, dweight_TK, index_TK.shape, DType::kF32, "dweight_TK");
  check_tensor(ex, weight_TK, index_TK.shape, DType::kF32, "weight_TK");
  check_terms(ex, terms, probs_TE.shape[0], probs_TE.shape[1]);
  ex.book(
      "route_tokens_backward", 6.0 * static_cast<double>(probs_TE.elements()),
      bytes_of(probs_TE) + bytes_of(index_TK) + 2 * bytes_of(weight_TK) + bytes_of(terms) + bytes_of(lse_T),
      bytes_of(dlogits_TE));
  dispatch(ex, &Backend::route_tokens_backward, dlogits_TE, dweight_TK, terms, routes, renormalize);
}

void balance_stats(Exec& ex, TensorView stats_3E, TensorView z_1, ConstTensorView probs_TE,
                   ConstTensorView index_TK, ConstTensorView lse_T) {
  check_scratch(ex);
  check_routes(ex, probs_TE, index_TK, lse_T);
  check_tensor(ex, stats_3E, {3, probs_TE.shape[1]}, DType::kF64, "stats_3E");
  check_tensor(ex, z_1, {1}, DType::kF64, "z_1");
  ex.book("balance_stats",
          static_cast<double>(probs_TE.elements() + index_TK.elements() + 2 * lse_T.elements()),
          bytes_of(probs_TE) + bytes_of(index_TK) + bytes_of(lse_T), bytes_of(stats_3E) + bytes_of(z_1));
  dispatch(ex, &Backend::balance_stats, stats_3E, z_1, probs_TE, index_TK, lse_T);
}

void row_balance_stats(Exec& ex, TensorView stats_2BE, ConstTensorView probs_TE, ConstTensorView index_TK,
                       ConstTensorView row_T) {
  UPMOE_CHECK(probs_TE.shape.rank == 2 && index_TK.shape.rank == 2 && stats_2BE.shape.rank == 3,
              "probs_TE {}, index_TK {}, stats_2BE {}", probs_TE.shape.str(), index_TK.shape.str(),
              stats_2BE.shape.str());
  check_tensor(ex, probs_TE, probs_TE.shape, DType::kF32, "probs_TE");
  check_tensor(ex, index_TK, {probs_TE.shape[0], index_TK.shape[1]}, DType::kI32, "index_TK");
  check_tensor(ex, row_T, {probs_TE.shape[0]}, DType::kI32, "row_T");
  check_tensor(ex, stats_2BE, {2, stats_2BE.shape[1], probs_TE.shape[1]}, DType::kF64, "stats_2BE");
  ex.book("row_balance_stats", static_cast<double>(probs_TE.elements() + index_TK.elements()),
          bytes_of(probs_TE) + bytes_of(index_TK) + bytes_of(row_T), bytes_of(stats_2BE));
  dispatch(ex, &Backend::row_balance_stats, stats_2BE, probs_TE, index_TK, row_T);
}

void expand_choices(Exec& ex, TensorView index_TS, ConstTensorView index_TK, ConstTensorView piece_EP) {
  UPMOE_CHECK(index_TK.shape.rank == 2 && piece_EP.shape.rank == 2, "index_TK {}, piece_EP {}",
              index_TK.shape.str(), piece_EP.shape.str());
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, piece_EP, piece_EP.shape, DType::kI32, "piece_EP");
  check_tensor(ex, index_TS, {index_TK.shape[0], index_TK.shape[1] * piece_EP.shape[1]}, DType::kI32,
               "index_TS");
  ex.book("expand_choices", 0, bytes_of(index_TK) + bytes_of(piece_EP), bytes_of(index_TS));
  dispatch(ex, &Backend::expand_choices, index_TS, index_TK, piece_EP);
}

void sort_by_expert(Exec& ex, TensorView order_N, TensorView slot_TK, TensorView counts_E,
                    ConstTensorView index_TK) {
  check_scratch(ex);
  UPMOE_CHECK(index_TK.shape.rank == 2 && counts_E.shape.rank == 1, "index_TK {}, counts_E {}",
              index_TK.shape.str(), counts_E.shape.str());
  const std::int64_t n = index_TK.elements();
  UPMOE_CHECK(n <= std::numeric_limits<std::int32_t>::max(), "{} assignments do not fit in int32", n);
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, order_N, {n}, DType::kI32, "order_N");
  check_tensor(ex, slot_TK, index_TK.shape, DType::kI32, "slot_TK");
  check_tensor(ex, counts_E, counts_E.shape, DType::kI32, "counts_E");
  ex.book("sort_by_expert", 0, bytes_of(index_TK),
          bytes_of(order_N) + bytes_of(slot_TK) + bytes_of(counts_E));
  dispatch(ex, &Backend::sort_by_expert, order_N, slot_TK, counts_E, index_TK);
}

void row_offsets(Exec& ex, TensorView offset_e1, ConstTensorView counts_e) {
  check_tensor(ex, counts_e, {counts_e.elements()}, DType::kI32, "counts_e");
  check_tensor(ex, offset_e1, {counts_e.elements() + 1}, DType::kI32, "offset_e1");
  ex.book("row_offsets", 0, bytes_of(counts_e), bytes_of(offset_e1));
  dispatch(ex, &Backend::row_offsets, offset_e1, counts_e);
}

void group_by_node(Exec& ex, TensorView order_X, TensorView slot_TM, TensorView counts_M,
                   ConstTensorView index_TK, std::span<const std::int64_t> node_begin) {
  UPMOE_CHECK(index_TK.shape.rank == 2 && node_begin.size() > 1, "index_TK {}, {} nodes",
              index_TK.shape.str(), node_begin.size());
  const std::int64_t tokens = index_TK.shape[0], nodes = static_cast<std::int64_t>(node_begin.size()) - 1;
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, order_X, {tokens * nodes}, DType::kI32, "order_X");
  check_tensor(ex, slot_TM, {tokens, nodes}, DType::kI32, "slot_TM");
  check_tensor(ex, counts_M, {nodes}, DType::kI32, "counts_M");
  ex.book("group_by_node", 0, bytes_of(index_TK), bytes_of(order_X) + bytes_of(slot_TM) + bytes_of(counts_M));
  dispatch(ex, &Backend::group_by_node, order_X, slot_TM, counts_M, index_TK, node_begin);
}

void node_choices(Exec& ex, TensorView index_XK, TensorView weight_XK, const NodeRows& nodes,
                  ConstTensorView index_TK, ConstTensorView weight_TK) {
  const auto& [order_X, counts_M, node_begin] = nodes;
  UPMOE_CHECK(index_TK.shape.rank == 2 && counts_M.size() + 1 == node_begin.size(), "index_TK {}, {} nodes",
              index_TK.shape.str(), counts_M.size());
  const std::int64_t rows = order_X.elements(), choices = index_TK.shape[1];
  check_tensor(ex, order_X, {rows}, DType::kI32, "order_X");
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, weight_TK, index_TK.shape, DType::kF32, "weight_TK");
  check_tensor(ex, index_XK, {rows, choices}, DType::kI32, "index_XK");
  check_tensor(ex, weight_XK, {rows, choices}, DType::kF32, "weight_XK");
  UPMOE_CHECK(std::accumulate(counts_M.begin(), counts_M.end(), std::int64_t{0}) == rows,
              "the nodes' rows are not {}", rows);
  ex.book("node_choices", 0, bytes_of(order_X) + 2 * bytes_of(index_XK), 2 * bytes_of(index_XK));
  dispatch(ex, &Backend::node_choices, index_XK, weight_XK, nodes, index_TK, weight_TK);
}

void regroup_runs(Exec& ex, TensorView regroup_R, TensorView ungroup_R,
                  std::span<const std::int64_t> arrival_begin, std::span<const std::int64_t> grouped_begin) {
  check_scratch(ex);
  UPMOE_CHECK(arrival_begin.size() == grouped_begin.size() + 1 && arrival_begin.front() == 0 &&
                  arrival_begin.back() == regroup_R.elements(),
              "{} runs begin at {} places, {} rows", grouped_begin.size(), arrival_begin.size(),
              regroup_R.elements());
  check_tensor(ex, regroup_R, {regroup_R.elements()}, DType::kI32, "regroup_R");
  check_tensor(ex, ungroup_R, {regroup_R.elements()}, DType::kI32, "ungroup_R");
  ex.book("regroup_runs", 0, 0, bytes_of(regroup_R) + bytes_of(ungroup_R));
  dispatch(ex, &Backend::regroup_runs, regroup_R, ungroup_R, arrival_begin, grouped_begin);
}

void gather_rows(Exec& ex, TensorView out_ND, ConstTensorView in_XD, ConstTensorView index_N,
                 std::int64_t divisor) {
  UPMOE_CHECK(out_ND.shape.rank >= 1 && in_XD.shape.rank >= 1 && divisor >= 1,
              "out_ND {}, in_XD {}, divisor {}", out_ND.shape.str(), in_XD.shape.str(), divisor);
  UPMOE_CHECK(row_elements(out_ND) == row_elements(in_XD), "rows of out_ND {} and in_XD {} differ",
              out_ND.shape.str(), in_XD.shape.str());
  check_tensor(ex, in_XD, in_XD.shape, in_XD.dtype, "in_XD");
  check_tensor(ex, out_ND, out_ND.shape, in_XD.dtype, "out_ND");
  check_tensor(ex, index_N, {index_N.elements()}, DType::kI32, "index_N");
  UPMOE_CHECK(index_N.elements() == out_ND.rows(), "{} indices for {} rows", index_N.elements(),
              out_ND.rows());
  ex.book("gather_rows", 0, bytes_of(out_ND) + bytes_of(index_N), bytes_of(out_ND));
  dispatch(ex, &Backend::gather_rows, out_ND, in_XD, index_N, divisor);
}

void gather_sum_rows(Exec& ex, TensorView y_TD, ConstTensorView rows_ND, ConstTensorView slot_TK,
                     const SumOnto& onto) {
  UPMOE_CHECK(y_TD.shape.rank == 2 && rows_ND.shape.rank == 2 && slot_TK.shape.rank == 2,
              "y_TD {}, rows_ND {}, slot_TK {}", y_TD.shape.str(), rows_ND.shape.str(), slot_TK.shape.str());
  check_float(rows_ND, "rows_ND");
  check_tensor(ex, rows_ND, {rows_ND.shape[0], y_TD.shape[1]}, rows_ND.dtype, "rows_ND");
  check_float_or(y_TD, rows_ND.dtype, "y_TD");
  check_tensor(ex, y_TD, y_TD.shape, y_TD.dtype, "y_TD");
  check_tensor(ex, slot_TK, {y_TD.shape[0], slot_TK.shape[1]}, DType::kI32, "slot_TK");
  const double row_bytes = static_cast<double>(y_TD.shape[1]) * static_cast<double>(size_of(rows_ND.dtype));
  const double slots = static_cast<double>(slot_TK.elements());
  const double added = (onto.base_TD.given() ? 1.0 : 0.0) + (onto.residual_TD.given() ? 1.0 : 0.0);
  double gate_bytes = 0;
  check_onto(ex, onto, y_TD, rows_ND.dtype);
  if (onto.gate.given()) {
    gate_bytes = bytes_of(onto.gate.dgate_T) + bytes_of(onto.gate.gate_T) + bytes_of(onto.gate.w_1D);
    // The model's work stays with the op that it is a part of.
    ex.book("sigmoid_gate_backward", 2.0 * static_cast<double>(y_TD.elements()), 0, 0, Work::kRowSums);
  }
  ex.book("gather_sum_rows",
          slots * static_cast<double>(y_TD.shape[1]) + added * static_cast<double>(y_TD.elements()),
          slots * row_bytes + bytes_of(slot_TK) + added * bytes_of(y_TD) + gate_bytes, bytes_of(y_TD));
  dispatch(ex, &Backend::gather_sum_rows, y_TD, rows_ND, slot_TK, onto);
}

}  // namespace upmoe::ops

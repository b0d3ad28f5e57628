#include "kernels/ops/routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/router_rows.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// Softmax of one row; returns its log-sum-exp.
float softmax_row(float* probs, const float* logits, std::int64_t experts) {
  // exp of the difference to the largest is at most 1: no logit is too large for it.
  const float max_logit = *std::max_element(logits, logits + experts);
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    store(probs + e, vector_exp(load(logits + e, lanes) - max_logit), lanes);
  });
  const float sum = sum_lanes(experts, [&](std::int64_t e, auto lanes) { return load(probs + e, lanes); });
  for_lanes(experts,
            [&](std::int64_t e, auto lanes) { store(probs + e, load(probs + e, lanes) / sum, lanes); });
  return max_logit + std::log(sum);
}

// With p = softmax(logits): dlogit_e = p_e (dp_e - sum_j p_j dp_j) + 2 z_scale lse p_e, where
// dp_e = aux_e + [e selected as k] dp_k;  dp_k = dweight_k, or with renormalised weights w_k = p_k / s:
// dp_k = (dweight_k - sum_j dweight_j w_j) / s.  dlogits serves as dp on the way.
struct RouteRow {
  const float *dweight, *weight, *probs;
  const std::int32_t* index;
  float lse;
};

void route_row_backward(float* dlogits, const RouteRow& row, const float* aux, float z_scale,
                        std::int64_t experts, std::int64_t k, bool renormalize) {
  float selected = 1, shift = 0;
  // w_j = p_j / s with s the sum over the selected: raising one raises s and lowers the others, hence the shift.
  if (renormalize) {
    selected = 0;
    for (std::int64_t j = 0; j < k; ++j) {
      if (row.index[j] < 0) continue;
      selected += row.probs[row.index[j]];
      shift += row.dweight[j] * row.weight[j];
    }
  }
  std::copy_n(aux, experts, dlogits);
  for (std::int64_t j = 0; j < k; ++j)
    if (row.index[j] >= 0) dlogits[row.index[j]] += (row.dweight[j] - shift) / selected;
  const float dot = sum_lanes(experts, [&](std::int64_t e, auto lanes) {
    return load(row.probs + e, lanes) * load(dlogits + e, lanes);
  });
  const float offset = 2.0f * z_scale * row.lse - dot;
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    store(dlogits + e, load(row.probs + e, lanes) * (load(dlogits + e, lanes) + offset), lanes);
  });
}

template <class Y, class X>
void sum_rows(const TensorView& y_TD, const X* rows, const std::int32_t* slot, std::int64_t k,
              const SumOnto& onto) {
  const std::int64_t tokens = y_TD.shape[0], width = y_TD.shape[1];
  Y* y = y_TD.as<Y>();
  const Y *base = onto.base_TD.if_given<Y>(), *residual = onto.residual_TD.if_given<Y>();
  const float *dgate = onto.gate.dgate_T.if_given<float>(), *gate = onto.gate.gate_T.if_given<float>();
  const X* w = onto.gate.w_1D.if_given<X>();
  parallel_for(tokens, k * width, [&](std::int64_t t) {
    const float dlogit = dgate != nullptr ? dgate[t] * gate[t] * (1.0f - gate[t]) : 0.0f;
    for_lanes(width, [&](std::int64_t i, auto lanes) {
      f32x16 sum{};
      for (std::int64_t j = 0; j < k; ++j)
        if (slot[t * k + j] >= 0) sum += load(rows + slot[t * k + j] * width + i, lanes);
      const std::int64_t at = t * width + i;
      if (base != nullptr) {
        f32x16 before = load(base + at, lanes);
        if (dgate != nullptr) before = rounded_to<Y>(before + dlogit * load(w + i, lanes));
        sum += before;
      }
      if (residual != nullptr) sum = rounded_to<Y>(sum) + load(residual + at, lanes);
      store(y + at, sum, lanes);
    });
  });
}

}  // namespace

void route_tokens(Exec&, TensorView probs_TE, TensorView index_TK, TensorView weight_TK, TensorView lse_T,
                  ConstTensorView logits_TE, bool renormalize) {
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1], k = index_TK.shape[1];
  const float* logits = logits_TE.as<float>();
  float *probs = probs_TE.as<float>(), *weight = weight_TK.as<float>(), *lse = lse_T.as<float>();
  auto* index = index_TK.as<std::int32_t>();
  require_finite(logits, tokens, experts);
  parallel_for(tokens, 8 * experts, [&](std::int64_t t) {
    float* w = weight + t * k;
    lse[t] = softmax_row(probs + t * experts, logits + t * experts, experts);
    TopK top{index + t * k, w, k};
    for (std::int64_t e = 0; e < experts; ++e) top.offer(e, probs[t * experts + e]);
    if (!renormalize) return;
    float selected = 0;
    for (std::int64_t j = 0; j < k; ++j) selected += w[j];
    for (std::int64_t j = 0; j < k; ++j) w[j] /= selected;
  });
}

void route_tokens_backward(Exec&, TensorView dlogits_TE, ConstTensorView dweight_TK,
                           const TermGradient& terms, const Routes& routes, bool renormalize) {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1], k = index_TK.shape[1];
  float* dlogits = dlogits_TE.as<float>();
  const float *dweight = dweight_TK.as<float>(), *weight = weight_TK.as<float>(),
              *probs = probs_TE.as<float>();
  const float* lse = lse_T.as<float>();
  const auto* index = index_TK.as<std::int32_t>();
  const AuxRows aux(terms, tokens);
  require_in_range(index, tokens * k, experts, "index_TK", -1);
  parallel_for(tokens, 4 * experts, [&](std::int64_t t) {
    const RouteRow row{dweight + t * k, weight + t * k, probs + t * experts, index + t * k, lse[t]};
    route_row_backward(dlogits + t * experts, row, aux.of(t), terms.z_scale, experts, k, renormalize);
  });
}

void balance_stats(Exec& ex, TensorView stats_3E, TensorView z_1, ConstTensorView probs_TE,
                   ConstTensorView index_TK, ConstTensorView lse_T) {
  constexpr std::int64_t kBlock = 256;  // tokens summed by one thread; blocks are added in order
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1], k = index_TK.shape[1];
  const float *probs = probs_TE.as<float>(), *lse = lse_T.as<float>();
  const auto* index = index_TK.as<std::int32_t>();
  require_in_range(index, tokens * k, experts, "index_TK", -1);
  ScratchScope scope(*ex.scratch);
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock, width = experts + 1;
  double* partials = ex.scratch->take({blocks, width}, DType::kF64, "balance_stats").as<double>();
  parallel_for(blocks, kBlock * experts, [&](std::int64_t b) {
    double* sum = partials + b * width;
    std::fill_n(sum, width, 0.0);
    for (std::int64_t t = b * kBlock; t < std::min(tokens, (b + 1) * kBlock); ++t) {
      for (std::int64_t e = 0; e < experts; ++e) sum[e] += static_cast<double>(probs[t * experts + e]);
      sum[experts] += static_cast<double>(lse[t]) * static_cast<double>(lse[t]);
    }
  });
  double *stats = stats_3E.as<double>(), *z = z_1.as<double>();
  std::fill_n(stats, 3 * experts, 0.0);
  *z = 0;
  // Blocks have a fixed size, not a thread's share, and are added in order: the same sum for any number of threads.
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t e = 0; e < experts; ++e) stats[2 * experts + e] += partials[b * width + e];
    *z += partials[b * width + experts];
  }
  for (std::int64_t i = 0; i < tokens * k; ++i)
    if (index[i] >= 0) stats[index[i]] += 1.0;
  for (std::int64_t t = 0; t < tokens; ++t)
    if (index[t * k] >= 0) stats[experts + index[t * k]] += 1.0;
}

// A row's tokens are added in their order by one thread.
void row_balance_stats(Exec&, TensorView stats_2BE, ConstTensorView probs_TE, ConstTensorView index_TK,
                       ConstTensorView row_T) {
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1], k = index_TK.shape[1],
                     rows = stats_2BE.shape[1];
  const auto *index = index_TK.as<std::int32_t>(), *row = row_T.as<std::int32_t>();
  const float* probs = probs_TE.as<float>();
  require_in_range(index, tokens * k, experts, "index_TK");
  require_in_range(row, tokens, rows, "row_T");
  parallel_for(rows, tokens, [&](std::int64_t b) {
    double *assigned = stats_2BE.as<double>() + b * experts, *sum = assigned + rows * experts;
    std::fill_n(assigned, experts, 0.0);
    std::fill_n(sum, experts, 0.0);
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (row[t] != b) continue;
      for (std::int64_t j = 0; j < k; ++j) assigned[index[t * k + j]] += 1.0;
      for (std::int64_t e = 0; e < experts; ++e) sum[e] += static_cast<double>(probs[t * experts + e]);
    }
  });
}

void expand_choices(Exec&, TensorView index_TS, ConstTensorView index_TK, ConstTensorView piece_EP) {
  const std::int64_t choices = index_TK.elements(), pieces = piece_EP.shape[1];
  const auto *index = index_TK.as<std::int32_t>(), *piece = piece_EP.as<std::int32_t>();
  auto* out = index_TS.as<std::int32_t>();
  require_in_range(index, choices, piece_EP.shape[0], "index_TK", -1);
  parallel_for(choices, pieces, [&](std::int64_t i) {
    if (index[i] < 0) {
      std::fill_n(out + i * pieces, pieces, -1);
    } else {
      std::copy_n(piece + index[i] * pieces, pieces, out + i * pieces);
    }
  });
}

void sort_by_expert(Exec& ex, TensorView order_N, TensorView slot_TK, TensorView counts_E,
                    ConstTensorView index_TK) {
  const std::int64_t n = index_TK.elements(), experts = counts_E.shape[0];
  const auto* index = index_TK.as<std::int32_t>();
  auto *order = order_N.as<std::int32_t>(), *slot = slot_TK.as<std::int32_t>();
  auto* counts = counts_E.as<std::int32_t>();
  require_in_range(index, n, experts, "index_TK", -1);
  ScratchScope scope(*ex.scratch);
  auto* next = ex.scratch->take({experts}, DType::kI32, "sort_by_expert").as<std::int32_t>();
  // A counting sort: how many rows each expert has, where its first one lies, then each row behind those before it.
  //
  //   index   1 0 1 2 0      counts   2 2 1      next   0 2 4      order   1 4 | 0 2 | 3      slot   2 0 3 4 1
  std::fill_n(counts, experts, 0);
  for (std::int64_t i = 0; i < n; ++i)
    if (index[i] >= 0) ++counts[index[i]];
  std::int32_t begin = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    next[e] = begin;
    begin += counts[e];
  }
  for (std::int64_t i = 0; i < n; ++i) {
    slot[i] = -1;
    if (index[i] < 0) continue;
    const std::int32_t at = next[index[i]]++;
    order[at] = static_cast<std::int32_t>(i);
    slot[i] = at;
  }
}

void row_offsets(Exec&, TensorView offset_e1, ConstTensorView counts_e) {
  const auto* counts = counts_e.as<std::int32_t>();
  auto* offset = offset_e1.as<std::int32_t>();
  *offset = 0;
  std::partial_sum(counts, counts + counts_e.elements(), offset + 1);
}

void group_by_node(Exec&, TensorView order_X, TensorView slot_TM, TensorView counts_M,
                   ConstTensorView index_TK, std::span<const std::int64_t> node_begin) {
  const std::int64_t tokens = index_TK.shape[0], k = index_TK.shape[1],
                     nodes = static_cast<std::int64_t>(node_begin.size()) - 1;
  const auto* index = index_TK.as<std::int32_t>();
  auto *order = order_X.as<std::int32_t>(), *slot = slot_TM.as<std::int32_t>();
  std::int32_t rows = 0;
  for (std::int64_t m = 0; m < nodes; ++m) {
    const std::int32_t before = rows;
    const std::int64_t first = node_begin[static_cast<std::size_t>(m)],
                       end = node_begin[static_cast<std::size_t>(m + 1)];
    // A token goes to a node once, however many of its experts lie there: the node's own ranks pass it on.
    for (std::int64_t t = 0; t < tokens; ++t) {
      const bool wanted = std::any_of(index + t * k, index + (t + 1) * k,
                                      [&](std::int32_t e) { return first <= e && e < end; });
      slot[t * nodes + m] = wanted ? rows : -1;
      if (wanted) order[rows++] = static_cast<std::int32_t>(t);
    }
    counts_M.as<std::int32_t>()[m] = rows - before;
  }
}

void node_choices(Exec&, TensorView index_XK, TensorView weight_XK, const NodeRows& nodes,
                  ConstTensorView index_TK, ConstTensorView weight_TK) {
  const auto& [order_X, counts_M, node_begin] = nodes;
  const std::int64_t k = index_TK.shape[1];
  std::int64_t row = 0;
  for (std::size_t m = 0; m < counts_M.size(); ++m)
    for (const std::int64_t end = row + counts_M[m]; row < end; ++row) {
      const std::int64_t t = order_X.as<std::int32_t>()[row];
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t e = index_TK.as<std::int32_t>()[t * k + j];
        const bool here = node_begin[m] <= e && e < node_begin[m + 1];
        index_XK.as<std::int32_t>()[row * k + j] = here ? static_cast<std::int32_t>(e - node_begin[m]) : -1;
        weight_XK.as<float>()[row * k + j] = here ? weight_TK.as<float>()[t * k + j] : 0.0f;
      }
    }
}

void regroup_runs(Exec&, TensorView regroup_R, TensorView ungroup_R,
                  std::span<const std::int64_t> arrival_begin, std::span<const std::int64_t> grouped_begin) {
  auto *regroup = regroup_R.as<std::int32_t>(), *ungroup = ungroup_R.as<std::int32_t>();
  for (std::size_t run = 0; run < grouped_begin.size(); ++run)
    for (std::int64_t arrival = arrival_begin[run]; arrival < arrival_begin[run + 1]; ++arrival) {
      const std::int64_t grouped = grouped_begin[run] + arrival - arrival_begin[run];
      regroup[grouped] = static_cast<std::int32_t>(arrival);
      ungroup[arrival] = static_cast<std::int32_t>(grouped);
    }
}

void gather_rows(Exec&, TensorView out_ND, ConstTensorView in_XD, ConstTensorView index_N,
                 std::int64_t divisor) {
  const std::int64_t rows = out_ND.rows();
  if (out_ND.bytes() == 0) return;
  const std::size_t row_bytes = out_ND.bytes() / static_cast<std::size_t>(rows);
  const auto* index = index_N.as<std::int32_t>();
  require_in_range(index, rows, checked_mul(in_XD.rows(), divisor), "index_N");
  const auto source = [&](std::int64_t i) { return divisor == 1 ? index[i] : index[i] / divisor; };
  // A routing weight per row: a call of memcpy would cost more than the copy.
  if (row_bytes == sizeof(float)) {
    return parallel_for(
        rows, 4, [&](std::int64_t i) { std::memcpy(out_ND.data + i * 4, in_XD.data + source(i) * 4, 4); });
  }
  parallel_for(rows, static_cast<std::int64_t>(row_bytes / 4), [&](std::int64_t i) {
    std::memcpy(out_ND.data + static_cast<std::size_t>(i) * row_bytes,
                in_XD.data + static_cast<std::size_t>(source(i)) * row_bytes, row_bytes);
  });
}

void gather_sum_rows(Exec&, TensorView y_TD, ConstTensorView rows_ND, ConstTensorView slot_TK,
                     const SumOnto& onto) {
  const std::int64_t tokens = y_TD.shape[0], k = slot_TK.shape[1];
  const auto* slot = slot_TK.as<std::int32_t>();
  require_in_range(slot, tokens * k, rows_ND.shape[0], "slot_TK", -1);
  with_float_type(y_TD.dtype, [&](auto y_type) {
    with_float_type(rows_ND.dtype, [&](auto x_type) {
      using X = decltype(x_type);
      sum_rows<decltype(y_type), X>(y_TD, rows_ND.as<X>(), slot, k, onto);
    });
  });
}

}  // namespace upmoe::cpu

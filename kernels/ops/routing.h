#pragma once
// Which expert computes which token: softmax and top-k, the sorted order, moving rows, and the balance terms.
// Router values (logits, probabilities, weights) are fp32; indices int32; rows fp32 or bf16.

#include <span>

#include "kernels/core/exec.h"

namespace upmoe {
// What route_tokens gave, for its backward.
struct Routes {
  ConstTensorView probs_TE, index_TK, weight_TK, lse_T;
};
// What the balance terms add to a router's backward.
struct TermGradient {
  // To the gradient of every probability of expert e: [E], alike for all tokens, or [B, E], of which token t takes
  // row row_T[t] (int32, in [0, B)).
  ConstTensorView aux, row_T = {};
  float z_scale = 0;  // times d(lse^2)
};
// The gradient of a sigmoid gate of each token, for the rows that the gate was made of: row t gets
// dgate_T[t] gate_T[t] (1 - gate_T[t]) w_1D, as in sigmoid_gate_backward. dgate_T, gate_T: fp32; w_1D: the rows' dtype.
struct GateGradient {
  ConstTensorView dgate_T, gate_T, w_1D;
  bool given() const { return dgate_T.given(); }
};
// What the sum of a token's rows is added to, each where given; every sum is rounded to the result's dtype, so that one
// pass has the bits of one after the other: residual + ((base + gate) + sum). Of the result's dtype; either may be it.
struct SumOnto {
  ConstTensorView base_TD = {};
  GateGradient gate = {};  // only with a base
  ConstTensorView residual_TD = {};
};
// One row for each pair of a token and a node that holds one of its choices, node by node: the row's token, how many
// rows each node has, and where its experts begin (both on the host).
struct NodeRows {
  ConstTensorView order_X;
  std::span<const std::int64_t> counts_M, node_begin;
};
}  // namespace upmoe

namespace upmoe::ops {

// probs_TE = softmax of logits_TE over all experts; index_TK, weight_TK: the K largest, in falling order, the
// lowest index first among equals; weight_TK divided by its row sum when `renormalize`. lse_T: log-sum-exp of
// the logits. A non-finite logit throws Error(kNumeric).
void route_tokens(Exec& ex, TensorView probs_TE, TensorView index_TK, TensorView weight_TK, TensorView lse_T,
                  ConstTensorView logits_TE, bool renormalize);

// dlogits_TE (overwritten) from dweight_TK and the balance terms. An index of -1 is none, with no gradient.
void route_tokens_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                           const TermGradient& terms, const Routes& routes, bool renormalize);

// Sums behind every balance term, over this micro-batch: stats_3E (fp64, overwritten) = assignments per
// expert over all k; over k = 0 alone; sum of probabilities. z_1 (fp64, overwritten) = sum of lse^2. An index of -1 is
// none.
void balance_stats(Exec& ex, TensorView stats_3E, TensorView z_1, ConstTensorView probs_TE,
                   ConstTensorView index_TK, ConstTensorView lse_T);

// The same by rows of tokens, such as sequences: stats_2BE (fp64, overwritten) = assignments of token rows b to expert
// e, over all k; sum of their probabilities. row_T: int32 in [0, B).
void row_balance_stats(Exec& ex, TensorView stats_2BE, ConstTensorView probs_TE, ConstTensorView index_TK,
                       ConstTensorView row_T);

// Choices of experts as choices of their pieces, where an expert's width is cut into P: index_TS[t, k*P + j]
// = piece_EP[index_TK[t, k], j], S = K*P; -1, for none, stays -1.
void expand_choices(Exec& ex, TensorView index_TS, ConstTensorView index_TK, ConstTensorView piece_EP);

// Stable sort of the N = T*K assignments by expert. order_N: sorted position -> flat t*K + k; slot_TK: its
// inverse; counts_E (int32): rows of each expert. An assignment of -1 is none: its slot is -1, and order_N
// holds the others only, from its beginning.
void sort_by_expert(Exec& ex, TensorView order_N, TensorView slot_TK, TensorView counts_E,
                    ConstTensorView index_TK);

// Where each expert's rows begin in that order, and R: offset_e1[i] = the sum of counts_e before i; int32.
void row_offsets(Exec& ex, TensorView offset_e1, ConstTensorView counts_e);

// Rows that arrive from several ranks, in runs, to be regrouped: run i is the arrivals [arrival_begin[i],
// arrival_begin[i+1]) and belongs at grouped_begin[i] on. regroup_R: grouped row -> arrival; ungroup_R: its
// inverse. Both spans are on the host; runs may be empty.
void regroup_runs(Exec& ex, TensorView regroup_R, TensorView ungroup_R,
                  std::span<const std::int64_t> arrival_begin, std::span<const std::int64_t> grouped_begin);

// out_N*[i] = in_X*[index_N[i] / divisor]: a row gather. Rows of any dtype and width; divisor K turns flat
// assignments into tokens. An index out of range is a broken contract.
void gather_rows(Exec& ex, TensorView out_ND, ConstTensorView in_XD, ConstTensorView index_N,
                 std::int64_t divisor);

// y_TD[t] = sum over k of rows_ND[slot_TK[t, k]], in k order, summed in fp32, slots of -1 left out, added to `onto`:
// the backward of a row gather.
void gather_sum_rows(Exec& ex, TensorView y_TD, ConstTensorView rows_ND, ConstTensorView slot_TK,
                     const SumOnto& onto = {});

// Which tokens have business on which of M nodes, where node m holds the experts [node_begin[m],
// node_begin[m+1]): one row for each pair of a token and a node that holds one of its choices, node by node,
// tokens in order. order_X: row -> token (of capacity T*M); slot_TM: row of token t on node m, or -1;
// counts_M (int32): rows of each node.
void group_by_node(Exec& ex, TensorView order_X, TensorView slot_TM, TensorView counts_M,
                   ConstTensorView index_TK, std::span<const std::int64_t> node_begin);
// What each of the X rows of the nodes' groups asks for: index_XK, the token's choices counted from the
// node's first expert, -1 where another node holds them; weight_XK, theirs, 0 there.
void node_choices(Exec& ex, TensorView index_XK, TensorView weight_XK, const NodeRows& rows,
                  ConstTensorView index_TK, ConstTensorView weight_TK);

}  // namespace upmoe::ops

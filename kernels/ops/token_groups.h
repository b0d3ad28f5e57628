#pragma once
// Routers that look at several tokens at once: every expert takes its best tokens of a group (Zhou et al. 2022), or
// computes one mixture of them (Antoniak et al. 2023). A group's tokens stand at one position of different sequences,
// so nothing looks ahead along time. Router values are fp32, rows fp32 or bf16 with sums in fp32.

#include "kernels/core/exec.h"

namespace upmoe {

// Of N tokens, `same` at each position: they are cut into groups of `size`, the last one of what is left.
struct TokenGroups {
  // int32: the tokens' rows, position by position and sequence by sequence; a permutation of [0, N).
  ConstTensorView row_N;
  std::int64_t same = 0, size = 0;

  std::int64_t of_position() const { return size > 0 ? (same + size - 1) / size : 0; }
  std::int64_t count() const { return same > 0 ? row_N.elements() / same * of_position() : 0; }
  std::int64_t last_size() const { return same - (of_position() - 1) * size; }
};
// Tokens of a group that every expert takes: of one of the groups' size, and of a position's last one.
struct GroupCapacity {
  std::int64_t full = 0, last = 0;
};
// Which of the groups' tokens lie here: T rows from `first` on.
struct GroupsHere {
  TokenGroups groups;
  std::int64_t first = 0;
};

}  // namespace upmoe

namespace upmoe::ops {

// index_NE[t, e] = e where expert e takes token t, -1 elsewhere. An expert takes the tokens of each group with the
// largest probs_NE[t, e] (compared as weight_order.h says), the first in the group's order among equals: exactly as
// many as `capacity` says.
void choose_tokens(Exec& ex, TensorView index_NE, ConstTensorView probs_NE, const TokenGroups& groups,
                   const GroupCapacity& capacity);

// part_NE[t, e] = the softmax of logits_NE[., e] / temperature over the tokens of t's group. A non-finite logit throws
// Error(kNumeric).
void mixture_parts(Exec& ex, TensorView part_NE, ConstTensorView logits_NE, const TokenGroups& groups,
                   float temperature);
// dlogits_NE (overwritten) from dpart_NE.
void mixture_parts_backward(Exec& ex, TensorView dlogits_NE, ConstTensorView dpart_NE,
                            ConstTensorView part_NE, const TokenGroups& groups, float temperature);

// Rows of M: expert e's of group g is g * E + e, and M is at least as many. mix_MD (overwritten) = the sums of
// part_TE[t, e] * x_TD[t] over the tokens that are here; 0 behind the last group.
void mix_tokens(Exec& ex, TensorView mix_MD, ConstTensorView x_TD, ConstTensorView part_TE,
                const GroupsHere& here);
// Its adjoint: y_TD[t] += sum over e, in order, of part_TE[t, e] * mix_MD[g(t) * E + e].
void share_mixtures(Exec& ex, TensorView y_TD, ConstTensorView mix_MD, ConstTensorView part_TE,
                    const GroupsHere& here);
// dpart_TE[t, e] (+)= <x_TD[t], mix_MD[g(t) * E + e]>: of either of the two above.
void mixture_part_gradient(Exec& ex, TensorView dpart_TE, ConstTensorView x_TD, ConstTensorView mix_MD,
                           const GroupsHere& here, Accumulate mode);

}  // namespace upmoe::ops

#pragma once
// Capacity: of a pool of tokens an expert takes so many assignments and no more (Lepikhin et al. 2020, Fedus et al.
// 2021). Indices int32, weights fp32.

#include "kernels/core/exec.h"

namespace upmoe {

struct CapacityRule {
  std::int64_t pool = 0;      // places [0, pool), [pool, 2 pool) ... are pools; N is a multiple of it
  std::int64_t capacity = 0;  // assignments of one pool that an expert takes, at least 1
};
// Of N tokens in whatever order they lie: row_N says for every place in the pools, first to last, where its token lies.
struct PooledChoices {
  ConstTensorView index_NK;        // experts in [0, E), or -1 for none; no expert twice for a token
  ConstTensorView weight_NK = {};  // not below 0; may be absent
  ConstTensorView row_N;           // a permutation of [0, N)
};

}  // namespace upmoe

namespace upmoe::ops {

// kept_NK = index_NK where the expert takes the assignment, -1 elsewhere. lost_GE (fp32, overwritten; G = N / pool):
// assignments that each expert did not take of each pool. Taken are the first `capacity` of an expert's assignments in
// this order: the largest weight first where weights are given (compared as weight_order.h says); then first choices
// before second ones; then by place.
// So the result depends on the places alone, not on how tokens lie.
void limit_choices(Exec& ex, TensorView kept_NK, TensorView lost_GE, const PooledChoices& choices,
                   const CapacityRule& rule);

}  // namespace upmoe::ops

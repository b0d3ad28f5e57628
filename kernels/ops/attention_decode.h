#pragma once
// Attention of new tokens over the keys and values of their rows, which are kept from step to step: what generation
// computes. fp32 or bf16; softmax in fp32, over the keys in the order of their positions, whatever else is computed
// with a token: it gets the same bits alone and beside others, of other rows or of no run. In a run it is computed with
// those of the run, and may be rounded otherwise.
//
// A cache is of one layer, and of the key/value heads of one rank:
//
//   position    0  1  2  3  4  5  6         slots S = 4, so position p lies in slot p mod 4:
//   slot        0  1  2  3  0  1  2         | 4 | 5 | 6 | 3 |
//
// Who attends says with the shape's window how far back that must reach: a window W and at most C new tokens of a row
// at once need W + C - 1 slots (the C new ones are stored before the first of them attends), without a window, and in
// rows of fewer tokens than that, as many as a row has tokens.

#include "kernels/ops/attention.h"

namespace upmoe {

struct KeyCache {
  TensorView k_BSK, v_BSK;  // [rows, slots, kv_heads * head_dim]
};

// T new tokens. int32: the row of the cache that a token continues, and its position in it, from 0 on. A row of -1:
// a token of none, which is not stored and gets 0.
struct CachedTokens {
  ConstTensorView row_T, position_T;
  std::int64_t seen = 0;  // keys that they see, all together: for the ledger, as the host alone knows it
  // So many of them, the first ones, are one behind the other in one row, and the others of none: a chunk of a prompt,
  // which a backend may compute by blocks, as whole sequences are. 0: nothing is said.
  std::int64_t run = 0;
};

}  // namespace upmoe

namespace upmoe::ops {

// Keys and values of the tokens go to their slots. qkv_TH as in attention.h, rotated. No two tokens of one slot.
void store_keys(Exec& ex, const KeyCache& cache, ConstTensorView qkv_TH, const CachedTokens& tokens,
                AttentionShape shape);

// Writes out_TQ: the queries of qkv_TH, each over what the cache has of its row up to its own position, that included.
// shape.seq_len is not looked at. A row or a position that the cache has no room for is a broken contract.
void attention_decode(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                      const CachedTokens& tokens, AttentionShape shape);

}  // namespace upmoe::ops

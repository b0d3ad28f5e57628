#pragma once
// AdamW with moments of 8 bits: each moment is a code (moment_codes.h) times a scale that 256 elements share
// (Dettmers et al. 2021 do the same with other codes), and bf16 weights without fp32 masters, rounded up or
// down by chance. 6 bytes for each parameter with its bf16 gradient, in place of 16.
//
// The update is adamw's, in fp32, from the decoded moments, with the roots and reciprocals of newton.h. Chance is
// Philox of (key, step, the element's place in the whole tensor; eight neighbours share a call), so a step has one
// result, on every device and however the tensor is sharded. Blocks lie at multiples of 256 in the shard.

#include "kernels/core/flat_index.h"
#include "kernels/ops/adamw.h"

namespace upmoe {

// The moments of elements [first, first + n) of a shard.
struct CodedMoments {
  TensorView m_n, v_n;              // codes, uint8
  TensorView m_scale_b, v_scale_b;  // fp32, of each block that the elements touch
  std::int64_t first = 0;
};
std::int64_t moment_blocks(std::int64_t first, std::int64_t n);

struct Chance {
  std::uint64_t key = 0;  // of the tensor: philox_key(seed, name)
  FlatIndex index;        // of the shard in the whole tensor
};

}  // namespace upmoe

namespace upmoe::ops {

// Flat tensors of equal length. weight, grad: fp32 or bf16 each.
void adamw8bit(Exec& ex, TensorView weight, const CodedMoments& moments, ConstTensorView grad,
               const AdamWStep& step, const Chance& chance);
// To and from fp32, rounded to nearest: what decode gives, encode gives back to the bit.
void encode_moments(Exec& ex, const CodedMoments& moments, ConstTensorView m_n, ConstTensorView v_n);
void decode_moments(Exec& ex, TensorView m_n, TensorView v_n, const CodedMoments& moments);

}  // namespace upmoe::ops

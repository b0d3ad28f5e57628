#pragma once
// Random bits of routers. They depend on the token's number in the whole run, the layer and a column (an expert, or an
// element of the token's row), so every layout and every recomputation draws the same.

#include "kernels/core/exec.h"
#include "kernels/core/philox.h"

namespace upmoe {

struct TokenDraws {
  std::uint64_t key = 0;    // of the seed and of what is drawn
  std::uint64_t first = 0;  // number, in the whole run, of the micro-batch's token at place 0
  std::uint32_t layer = 0;
  ConstTensorView place_T;  // int32: where each token stands in the micro-batch
};

// 32 random bits of a token and a column: a counter has four columns.
constexpr std::uint32_t router_bits(std::uint64_t key, std::uint64_t token, std::uint32_t layer,
                                    std::uint32_t column) {
  const Philox4 four = philox(key, token, std::uint64_t{layer} << 32 | column / 4);
  return column % 4 == 0 ? four[0] : column % 4 == 1 ? four[1] : column % 4 == 2 ? four[2] : four[3];
}

}  // namespace upmoe

namespace upmoe::ops {

// kept_T2 = index_T2, but -1 for a second choice with probability 1 - min(1, 2 weight_T2[t, 1]) (Lepikhin et al. 2020,
// Algorithm 1); the column is the second expert.
void draw_second(Exec& ex, TensorView kept_T2, ConstTensorView index_T2, ConstTensorView weight_T2,
                 const TokenDraws& draws);

// y_TD (+)= x_TD times one factor for each element, uniform in (1 - amount, 1 + amount) (Fedus et al. 2021). In a sum
// with rows of gradients it is its own adjoint. fp32 or bf16, both alike.
void jitter(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenDraws& draws, float amount,
            Accumulate mode);

}  // namespace upmoe::ops

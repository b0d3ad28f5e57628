#pragma once
// Low-rank adapters (Hu et al., arXiv 2106.09685). Beside a frozen weight w_NK stands a product of two small matrices,
//
//   y_N = w_NK x_K + (alpha / rank) b_NL a_LK x_K,    L = rank,
//
// and these two train. a begins as PEFT draws it (uniform within 1 / sqrt(K)), b as zeros: before its first step the
// model computes what it computed.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "configs/names.h"

namespace upmoe {

// What PEFT calls a target module, in the names that most families give it; a gate_proj is that of every dense network,
// routed and shared expert.
enum class LoraTarget : std::uint8_t { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };
template <>
inline constexpr Names<LoraTarget> kNames<LoraTarget>{.built = {{LoraTarget::kQuery, "q_proj"},
                                                                {LoraTarget::kKey, "k_proj"},
                                                                {LoraTarget::kValue, "v_proj"},
                                                                {LoraTarget::kOutput, "o_proj"},
                                                                {LoraTarget::kGate, "gate_proj"},
                                                                {LoraTarget::kUp, "up_proj"},
                                                                {LoraTarget::kDown, "down_proj"}}};

struct LoraForm {
  int rank = 0;  // 0: the model has no adapters
  double alpha = 16;
  std::vector<LoraTarget> targets = {LoraTarget::kQuery, LoraTarget::kKey, LoraTarget::kValue,
                                     LoraTarget::kOutput};
  bool given() const { return rank > 0; }
  bool has(LoraTarget t) const { return std::find(targets.begin(), targets.end(), t) != targets.end(); }
  double scale() const { return alpha / rank; }
};

}  // namespace upmoe

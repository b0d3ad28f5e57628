#pragma once
// What a mixture's router computes beside its weight, in words of no family: part of a model, as its function depends
// on it.

#include <cstdint>

#include "configs/names.h"

namespace upmoe {

// Of an expert for a token: its share of a softmax over all experts, or the sigmoid of its own logit.
enum class RouterScore : std::uint8_t { kSoftmax, kSigmoid };
template <>
inline constexpr Names<RouterScore> kNames<RouterScore>{
    .built = {{RouterScore::kSoftmax, "softmax"}, {RouterScore::kSigmoid, "sigmoid"}}};

struct RouterForm {
  RouterScore score = RouterScore::kSoftmax;
  // Experts lie in groups of equal size, of which the best `group_topk` may be chosen from.
  int groups = 1, group_topk = 1;
  double scale = 1;  // of the chosen experts' weights
  friend bool operator==(const RouterForm&, const RouterForm&) = default;
};

}  // namespace upmoe

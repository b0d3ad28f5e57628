#pragma once
// What a router gives and an exchange takes: which experts compute each token, and with which weight.

#include <algorithm>

#include "kernels/core/tensor.h"

namespace upmoe {

// K slots for every token. A slot of -1 is none: its weight is not read and has no gradient. So tokens may have
// different numbers of experts, from none to K.
struct Choices {
  ConstTensorView index_TK, weight_TK;  // int32, fp32
  bool gaps = false;                    // there may be such slots; else all are experts
  // Slots that are not none, on the mean, where a router knows it without a look: what a rehearsal, whose slots are
  // empty, takes them to be. Below 0: all of them.
  std::int64_t taken = -1;
  // Rows that the experts compute instead of the tokens': T is their number then (Router::outputs).
  ConstTensorView rows_TD = {};

  ConstTensorView rows_of(ConstTensorView x_TD) const { return rows_TD.given() ? rows_TD : x_TD; }
  // Experts of a token, rounded up.
  std::int64_t of_token() const {
    const std::int64_t T = index_TK.shape[0], K = index_TK.shape[1];
    return taken < 0 || T == 0 ? K : std::clamp<std::int64_t>((taken + T - 1) / T, 1, K);
  }
};

}  // namespace upmoe

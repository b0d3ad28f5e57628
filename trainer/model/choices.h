#pragma once
// What a router gives and an exchange takes: which experts compute each token, and with which weight.

#include "kernels/core/tensor.h"

namespace upmoe {

// K slots for every token. A slot of -1 is none: its weight is not read and has no gradient. So tokens may have
// different numbers of experts, from none to K.
struct Choices {
  ConstTensorView index_TK, weight_TK;  // int32, fp32
};

}  // namespace upmoe

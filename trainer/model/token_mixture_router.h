#pragma once
// Mixture of tokens (Antoniak et al. 2023). Of a group of tokens at one position every expert e computes one row, their
// mixture, and the tokens share what comes of it in the same parts:
//
//   part_te = softmax over the group's tokens t of logit_te / temperature
//   mix_e = sum over t of part_te x_t,   y_t = sum over e of part_te expert_e(mix_e)
//
// All experts compute as many rows, and nothing is chosen.

#include "trainer/model/router.h"
#include "trainer/model/router_product.h"

namespace upmoe {

// Asks for RouterBalance::groups.
std::unique_ptr<const Router> make_token_mixture_router(const RouterProduct& product, double temperature);

}  // namespace upmoe

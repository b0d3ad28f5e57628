#pragma once
// Experts choose tokens (Zhou et al. 2022): of every group of tokens at one position each expert takes those that give
// it the largest probability of a softmax over all experts, and as many as any other expert. The probabilities are the
// weights; a token has from none to all of the experts.

#include "trainer/model/router.h"
#include "trainer/model/router_product.h"

namespace upmoe {

// choices: experts of a token on the mean (chosen_of_group of configs/expert_use.h). Asks for RouterBalance::groups.
std::unique_ptr<const Router> make_expert_choice_router(const RouterProduct& product, double choices);

}  // namespace upmoe

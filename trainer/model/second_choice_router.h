#pragma once
// GShard's second choices (Lepikhin et al. 2020, Algorithm 1): in training the second expert of a token is kept with a
// probability of twice its weight; outside training always.

#include "trainer/model/router.h"

namespace upmoe {

// `router` chooses two experts whose weights add up to 1.
std::unique_ptr<const Router> make_second_choice_router(std::unique_ptr<const Router> router);

}  // namespace upmoe

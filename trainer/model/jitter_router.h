#pragma once
// Jitter (Fedus et al. 2021): in training a router sees its input times factors around 1 (router.jitter); the experts
// see the input as it is.

#include "trainer/model/router.h"

namespace upmoe {

// The choices of `router` for such an input; amount in (0, 1).
std::unique_ptr<const Router> make_jitter_router(std::unique_ptr<const Router> router, double amount);

}  // namespace upmoe

#pragma once
// A fixed factor on the weights of the chosen experts (router.scale), whichever router chose them.

#include "trainer/model/router.h"

namespace upmoe {

// The choices of `router`, their weights times `factor`; the balance terms stay the router's own.
std::unique_ptr<const Router> make_scaled_router(std::unique_ptr<const Router> router, double factor);

}  // namespace upmoe

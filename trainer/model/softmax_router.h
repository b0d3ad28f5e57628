#pragma once
// Softmax over all experts, of which the top_k largest are chosen: their probabilities are the weights, divided by
// their sum where `renormalize`.

#include "trainer/model/router.h"
#include "trainer/model/router_product.h"

namespace upmoe {

std::unique_ptr<const Router> make_softmax_router(const RouterProduct& product, std::int64_t top_k,
                                                  bool renormalize);

}  // namespace upmoe

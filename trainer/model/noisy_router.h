#pragma once
// Noisy top-k gating (Shazeer et al. 2017): in training a softmax router whose logits carry noise, of a size that it
// learns for each token and expert; outside training the softmax router alone (kernels/ops/noisy_routing.h). The
// balance terms are of the noisy logits.

#include "trainer/model/router.h"
#include "trainer/model/router_product.h"

namespace upmoe {

// noise: of the weight that gives the noise's scales, [E, D].
std::unique_ptr<const Router> make_noisy_router(const RouterProduct& product, const RouterProduct& noise,
                                                std::int64_t top_k, bool renormalize);

}  // namespace upmoe

#pragma once
// Each expert's score is the sigmoid of its own logit; the choice adds a bias that balances the experts without a loss
// (arXiv 2408.15664), the weights do not (kernels/ops/sigmoid_routing.h).

#include "kernels/ops/sigmoid_routing.h"
#include "trainer/model/router.h"
#include "trainer/model/router_product.h"

namespace upmoe {

// bias_E: the buffer, fp32; without a shape there is none.
std::unique_ptr<const Router> make_sigmoid_router(const RouterProduct& product, ConstTensorView bias_E,
                                                  std::int64_t top_k, const SigmoidRule& rule);

}  // namespace upmoe

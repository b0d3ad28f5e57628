#pragma once
// A limit on what each expert takes in training (router.capacity_factor), whichever router chose: what is dropped
// passes the mixture by, on the residual stream. The balance terms stay those of the choices.

#include "configs/router_form.h"
#include "trainer/model/router.h"

namespace upmoe {

struct CapacityForm {
  std::int64_t experts = 0;
  double factor = 1;  // of expert_capacity (configs/expert_use.h)
  CapacityPool pool = CapacityPool::kSequence;
  DropBy drop = DropBy::kOrder;
};

// The choices of `router` that their experts take; none other than its own weights and gradients.
std::unique_ptr<const Router> make_capacity_router(std::unique_ptr<const Router> router,
                                                   const CapacityForm& form);

}  // namespace upmoe

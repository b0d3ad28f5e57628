#pragma once
// A limit on what each expert takes in training (router.capacity_factor), whichever router chose: what is dropped
// passes the mixture by, on the residual stream. The balance terms stay those of the choices.

#include "configs/router_form.h"
#include "trainer/model/router.h"

namespace upmoe {

struct CapacityForm {
  std::int64_t experts = 0;
  double factor = 1;
  CapacityPool pool = CapacityPool::kSequence;
  DropBy drop = DropBy::kOrder;
};

// ceil(factor * choices / experts), at least 1, of a pool with as many choices, k of a token counted k times (Lepikhin
// et al. 2020, Fedus et al. 2021). Factors are decimal numbers: what rounding adds to a whole one is no assignment.
std::int64_t expert_capacity(double factor, std::int64_t choices, std::int64_t experts);

// The choices of `router` that their experts take; none other than its own weights and gradients.
std::unique_ptr<const Router> make_capacity_router(std::unique_ptr<const Router> router,
                                                   const CapacityForm& form);

}  // namespace upmoe

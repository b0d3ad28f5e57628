#pragma once
// The shape of the mixture that a recipe makes of a dense model, and the family that it is written as.

#include "configs/families/mixture_choice.h"
#include "configs/upcycle_config.h"

namespace upmoe {

// The dense model's with the FFN replaced.
WantedMixture wanted_mixture(const UpcycleConfig& config, const ModelConfig& dense);
// In the form of its family. Throws Error(kUsage) where no family carries it, or not the one asked for.
ModelConfig make_moe_config(const UpcycleConfig& config, const ModelConfig& dense);

}  // namespace upmoe

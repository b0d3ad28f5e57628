#pragma once
// How far a layer of the mixture, as written, is from the dense FFN it was made of.

#include "upcycle/transforms.h"

namespace upmoe {

// ||MoE(x) - FFN(x)|| / ||FFN(x)|| over `tokens` random inputs x: unit normal, RMS-normalised, times the
// layer's own norm weight, as the FFN sees them. Computed with the ops of the real layer, in fp32, on the CPU. Experts
// are made again from the recipe, some rows at a time, and only those that the router picks: cheap at any size. Same
// value for any number of ranks and threads.
double layer_error(const Recipe& recipe, int layer, const ModelConfig& moe, const FillContext& context,
                   int tokens);
// The same of a mixture that grew, against the source's: `origin` is copy_of_mixture().
double growth_error(const Recipe& recipe, const Recipe& origin, int layer, const ModelConfig& moe,
                    const FillContext& context, int tokens);

}  // namespace upmoe

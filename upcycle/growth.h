#pragma once
// A mixture becomes a larger one: every expert several times, its router row with it. Expert e of E is e, e + E,
// e + 2 E, ... of the larger mixture, so the first E are the source's.
//
// With m copies of each expert, no noise, and m times as many experts chosen for a token, the function stays as it
// is: the copies of an expert have equal scores and are chosen together or not at all. Of a softmax each then has 1/m
// of the weight that the expert had, renormalised or not; so has each of renormalised sigmoids.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/upcycle_config.h"
#include "upcycle/recipe.h"

namespace upmoe {

// One sentence for everything that keeps `source` from growing as the recipe says; empty: nothing.
std::vector<std::string> growth_problems(const UpcycleConfig& config, const ModelConfig& source);
// The larger mixture.
ModelConfig grown_config(const UpcycleConfig& config, const ModelConfig& source);
// Throws Error(kUsage) with growth_problems().
Recipe make_growth(const UpcycleConfig& config, const ModelConfig& source);
// The recipe that copies a mixture as it is: what layer_error() holds the larger one against.
Recipe copy_of_mixture(const ModelConfig& source);

}  // namespace upmoe

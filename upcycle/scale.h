#pragma once
// The factor on the experts' down projections with which the mixture starts out as the dense FFN.

#include <cstdint>

#include "configs/router_form.h"
#include "configs/upcycle_config.h"

namespace upmoe {

// Shards of `width` neurons that one copy of a dense FFN of `dense_width` neurons makes, the last one padded.
std::int64_t shards_per_copy(std::int64_t dense_width, std::int64_t width);

// experts.scale as given, or what `auto` stands for: 1 where the shared expert carries the function
// (shared.method dense) or nothing is kept, else the preserving factor derived in scale.cpp, which goes by how the
// mixture's routers score.
double resolve_scale(const UpcycleConfig& config, std::int64_t dense_width, RouterScore score);
// shared.scale as given, or what `auto` stands for: 2 where a gate on the shared expert begins at 1/2, else 1.
double resolve_shared_scale(const UpcycleConfig& config, bool gate);

}  // namespace upmoe

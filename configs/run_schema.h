#pragma once
// The keys of a run configuration, bound to a struct.

#include "configs/run_config.h"
#include "configs/schema.h"

namespace upmoe {

Schema run_schema(RunConfig& run);

}  // namespace upmoe

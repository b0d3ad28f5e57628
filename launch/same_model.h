#pragma once
// A model that every rank of a command reads itself.

#include <string>

#include "data/model_source.h"
#include "parallel/communicator.h"

namespace upmoe {

// That all of them met the same one under the name `given`. Throws Error(kUsage) where they did not. Collective.
void require_same_model(Communicator& world, const std::string& given, const ModelSource& source);

}  // namespace upmoe

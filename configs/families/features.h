#pragma once
// Keys of a config.json that would change what the model computes, and that this program does not know.

#include "configs/families/family.h"
#include "configs/json_reader.h"

namespace upmoe {

// Refuses each that is there with a value that is not without effect, but for those that the family reads itself.
void refuse_features(JsonObject& json, const Family& family);

}  // namespace upmoe

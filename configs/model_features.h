#pragma once
// Keys of a config.json that would change what the model computes, and that this program does not know.

#include "configs/json_reader.h"
#include "configs/model_config.h"

namespace upmoe {

// Refuses each that is there with a value that is not without effect. `config`: the sizes read so far.
void refuse_features(JsonObject& json, const ModelConfig& config);

}  // namespace upmoe

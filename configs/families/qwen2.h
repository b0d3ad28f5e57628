#pragma once
// Qwen2, and what its mixtures say as it does.

#include "configs/families/family.h"

namespace upmoe {

extern const Family kQwen2;

// What its layers, and those of its mixtures, can have.
inline constexpr Traits kQwen2Layers =
    kPlainLayers | Traits{Trait::kBiases, Trait::kNoBiases, Trait::kOwnHeadDim};

void read_qwen2(JsonObject& json, ModelConfig& c);
void refuse_window(JsonObject& json);  // where one reaches a layer, which the two types say differently
void write_qwen2(const ModelConfig& c, JsonWriter& json);

}  // namespace upmoe

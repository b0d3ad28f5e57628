#pragma once
// Qwen2, and what its mixtures say as it does.

#include "configs/families/family.h"

namespace upmoe {

extern const Family kQwen2;

// What its layers, and those of its mixtures, can have.
inline constexpr Traits kQwen2Layers =
    kPlainLayers | Traits{Trait::kBiases, Trait::kNoBiases, Trait::kOwnHeadDim};

void read_qwen2(JsonObject& json, ModelConfig& c);
// Whether a dense model, which says by number which layers attend within a window, has one.
bool window_reaches_a_layer(JsonObject& json, const ModelConfig& c);
void refuse_window(JsonObject& json);  // where one reaches a layer, which the two types say differently
void write_qwen2(const ModelConfig& c, JsonWriter& json);

}  // namespace upmoe

#pragma once
// Qwen2, and what its mixtures say as it does.

#include "configs/families/family.h"

namespace upmoe {

extern const Family kQwen2;

void read_qwen2(JsonObject& json, ModelConfig& c);
void refuse_window(JsonObject& json);  // where one reaches a layer, which the two types say differently
void write_qwen2(const ModelConfig& c, JsonWriter& json);

}  // namespace upmoe

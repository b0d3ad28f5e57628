#pragma once
// A model's router in a config.json: `upmoe_router`, for what of it the family does not carry (kRouterTraits of
// configs/families/traits.h). Checkpoints have it; an export refuses it (why_not_exported), as nobody else would read
// it.

#include <string>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

class JsonObject;
class JsonWriter;

void read_router(JsonObject& json, ModelConfig& config);
// A router that a config.json without the key would have leaves no key.
void write_router(const ModelConfig& config, JsonWriter& json);

// The model that a run trains: `model` with the routers that the run asks for.
ModelConfig with_router(ModelConfig model, const RunConfig::Router& router);
// Throws Error(kUsage) where a run that goes on asks for other routers than those of `checkpoint`; biases may be added.
void require_same_router(const ModelConfig& saved, const ModelConfig& asked, const std::string& checkpoint);
// What cannot be together, one sentence for each; `model` as with_router gives it.
std::vector<std::string> router_problems(const RunConfig::Router& router, const ModelConfig& model);

std::string words_of(const RouterForm& form);  // "score sigmoid, groups 8, group_topk 4, scale 2.5"

// In one sentence, why a model directory cannot say what this router does; empty when it can. The values of biases
// are not looked at.
std::string why_not_exported(const ModelConfig& config);

}  // namespace upmoe

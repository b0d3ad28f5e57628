#pragma once
// What the config.json of mixtures says alike of its experts, in pieces.

#include <initializer_list>

#include "configs/json_reader.h"
#include "configs/json_writer.h"
#include "configs/model_config.h"

namespace upmoe {

// Routed experts and how many of them a token takes. Of the names of their number, those that are given must agree;
// where none is, the first is asked for.
void read_num_experts(JsonObject& json, ModelConfig& c, std::initializer_list<const char*> names);
// Which layers stay dense: decoder_sparse_step, mlp_only_layers.
void read_kept_layers(JsonObject& json, ModelConfig& c);
// Refuses a key that this family's layers leave aside, unless it says what they do: `what` they do, in words.
void require_truth(JsonObject& json, const char* key, bool expected, const char* what);

void write_kept_layers(const ModelConfig& c, JsonWriter& json);
void write_balance(const ModelConfig& c, JsonWriter& json);  // router_aux_loss_coef, output_router_logits

}  // namespace upmoe

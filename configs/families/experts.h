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

// As many shared experts as n_shared_experts says, which have no gate and are one FFN as wide as they are together;
// their width is moe_intermediate_size, which has been read. Absent and not required: none.
void read_shared_experts(JsonObject& json, ModelConfig& c, bool required);

// Layers that stay dense, of a family that says how many lie in front of the mixtures. Where others do they are left as
// they are, and the family does not carry them.
void put_dense_layers_in_front(ModelConfig& c);

void write_kept_layers(const ModelConfig& c, JsonWriter& json);
void write_balance(const ModelConfig& c, JsonWriter& json);  // router_aux_loss_coef, output_router_logits

}  // namespace upmoe

#pragma once
// A model's adapters in a config.json: `upmoe_lora`, which checkpoints have. An export has either the adapters, as PEFT
// writes them (data/peft_adapter.h), or the model that they are merged into.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

class JsonObject;
class JsonWriter;

inline constexpr int kMostLoraRank = 1 << 12;  // in configurations as in a config.json

void read_lora(JsonObject& json, ModelConfig& config);
void write_lora(const ModelConfig& config, JsonWriter& json);  // none leaves no key

// The model that a run trains: `model` with the adapters that the run asks for, targets in the order of their names.
ModelConfig with_lora(ModelConfig model, const LoraForm& lora);
// Throws Error(kUsage) where `model`, read from `where`, has other adapters than `asked`, as with_lora gives it;
// `goes_on`: a run goes on from there, to which none can be added either.
void require_same_lora(const ModelConfig& model, const ModelConfig& asked, const std::string& where,
                       bool goes_on);
// What cannot be together, one sentence for each; `model` as with_lora gives it.
std::vector<std::string> lora_problems(const RunConfig& run, const ModelConfig& model);

bool same_lora(const LoraForm& one, const LoraForm& two);
std::string words_of(const LoraForm& form);  // "rank 8, alpha 16, targets q_proj v_proj"

}  // namespace upmoe

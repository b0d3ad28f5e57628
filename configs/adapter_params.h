#pragma once
// The parameters of low-rank adapters (lora_form.h). Each of PEFT's modules has an a and a b of its own, though several
// of them may be one product here: queries, keys and values; gates and ups.
//
// Names (stable for ever, they are on disk; i = layer, L = rank; N and K: rows and columns of the module's weight):
//   layers.i.attn.{q,k,v}.lora_A_LD [L,D] · .lora_B_NHL [heads,head,L]
//   layers.i.attn.o.lora_A_LNH [L,heads,head] · .lora_B_DL [D,L]
//   layers.i.{ffn,shared}.{gate,up}.lora_A_LD [L,D] · .lora_B_FL [F,L] · .down.lora_A_LF [L,F] · .lora_B_DL [D,L]
//   layers.i.moe.{gate,up}.lora_A_ELD [E,L,D] · .lora_B_EFL [E,F,L] · .down.lora_A_ELF [E,L,F] · .lora_B_EDL [E,D,L]

#include <string>
#include <vector>

#include "configs/param_table.h"

namespace upmoe {

// The roles and halves whose weight a target names, in the order of the table.
std::vector<AdaptedPart> parts_of(LoraTarget target);
std::string adapter_name(const AdaptedPart& part, AdapterFactor factor, int layer);
// Those of a weight, in the order of the table: of each half that is a target a, then b.
std::vector<ParamSpec> adapter_params(const ModelConfig& config, Role role, int layer);

}  // namespace upmoe

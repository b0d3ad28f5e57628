#pragma once
// The shape of Qwen1.5-MoE-A2.7B.

#include "configs/model_config.h"

namespace upmoe {

inline ModelConfig full_size() {
  ModelConfig c;
  c.model_type = "qwen2_moe";
  c.vocab_size = 151936;
  c.hidden_size = 2048;
  c.intermediate_size = c.shared_expert_intermediate_size = 5632;
  c.num_hidden_layers = 24;
  c.num_attention_heads = c.num_key_value_heads = 16;
  c.head_dim = 128;
  c.max_position_embeddings = 8192;
  c.num_experts = 60;
  c.num_experts_per_tok = 4;
  c.moe_intermediate_size = 1408;
  return c;
}

}  // namespace upmoe

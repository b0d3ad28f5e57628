#pragma once
// The configuration of a mixture of two small layers: for tests of what is said about a model.

#include "configs/model_config.h"

namespace upmoe::test {

inline ModelConfig tiny_moe_config() {
  ModelConfig c;
  c.model_type = "qwen2_moe";
  c.vocab_size = 64;
  c.hidden_size = 64;
  c.num_hidden_layers = 2;
  c.num_attention_heads = c.num_key_value_heads = 4;
  c.head_dim = 16;
  c.intermediate_size = 48;
  c.num_experts = 4;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 16;
  c.shared_expert_intermediate_size = 16;
  c.max_position_embeddings = 64;
  return c;
}

}  // namespace upmoe::test

#pragma once
// The shape of a model, in words of no family, from a Hugging Face config.json (configs/families).

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "configs/file_dtype.h"
#include "configs/lora_form.h"
#include "configs/model_traits.h"
#include "configs/router_form.h"

namespace upmoe {

struct ModelConfig {
  std::string model_type = "qwen2";  // of the family that wrote it and will read it
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0;
  std::int64_t head_dim = 0;  // hidden_size / heads unless the file says otherwise
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6, rope_theta = 1e6, initializer_range = 0.02;
  bool tie_word_embeddings = false;
  bool qkv_bias = true;
  NormKind norm = NormKind::kRms;
  Activation activation = Activation::kSilu;
  QkNorm qk_norm = QkNorm::kNone;
  double clip_qkv = 0;            // q, k and v are held within +-this, before they are rotated; 0 = none
  bool scaled_embedding = false;  // rows times sqrt(hidden_size), a factor rounded to the embedding's dtype
  // A token sees itself and the sliding_window - 1 before it; 0 = all before it.
  std::int64_t sliding_window = 0;
  FileDType dtype = FileDType::kBf16;

  // Mixtures; num_experts 0 = dense
  int num_experts = 0, num_experts_per_tok = 0, decoder_sparse_step = 1;
  std::int64_t moe_intermediate_size = 0, shared_expert_intermediate_size = 0;  // shared 0 = none
  bool shared_expert_gate = true;  // a sigmoid for each token, on the shared expert's output
  bool norm_topk_prob = false;
  RouterForm router;
  bool router_bias = false;  // a buffer beside each router, added to its scores where it chooses
  bool router_load = false;  // another one: each expert's share of the assignments of the step before
  double router_aux_loss_coef = 0.001;
  int first_k_dense_replace = 0;  // layers in front of the first mixture
  std::vector<int> mlp_only_layers;

  LoraForm lora;  // adapters that train beside the weights of a run

  std::string raw_json = "{}";  // the file as read: keys we do not know are carried through to the output

  bool is_moe_layer(int layer) const;
  int num_moe_layers() const;
  // What a token gets depends on the other tokens of its group (RouterForm::routes_groups), in some layer.
  bool routes_groups() const { return num_moe_layers() > 0 && router.routes_groups(); }
};

// Reads `path` (config.json, or a directory that holds one). Throws Error(kBadInput) that lists every problem.
ModelConfig read_model_config(const std::filesystem::path& path);
ModelConfig parse_model_config(const std::string& json, const std::string& where);
// The config.json that transformers v4, v5 and vLLM read: rope_theta and rope_parameters, torch_dtype and
// dtype, mlp_only_layers, architectures; unknown keys of raw_json kept.
std::string to_hf_json(const ModelConfig& config);

}  // namespace upmoe

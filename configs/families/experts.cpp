#include "configs/families/experts.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/families/decoder.h"
#include "configs/families/traits.h"

namespace upmoe {

void read_num_experts(JsonObject& json, ModelConfig& c, std::initializer_list<const char*> names) {
  ConfigKeys f(json);
  const auto given = [&](const char* name) { return json.has(name); };
  const auto first = std::find_if(names.begin(), names.end(), given);
  const char* name = first == names.end() ? *names.begin() : *first;
  f.integer(name, c.num_experts, 1, kMaxExperts);
  for (auto other = first; other != names.end(); ++other) {
    int count = c.num_experts;
    if (!given(*other) || *other == name) continue;
    f.integer(*other, count, 1, kMaxExperts);
    if (count != c.num_experts)
      json.refuse(*other, fmt::format("found {}, but {} is {}", count, name, c.num_experts));
  }
  f.integer("num_experts_per_tok", c.num_experts_per_tok, 1, kMaxExperts);
  if (c.num_experts > 0 && c.num_experts_per_tok > c.num_experts) {
    json.refuse("num_experts_per_tok",
                fmt::format("{} of {} experts cannot be chosen", c.num_experts_per_tok, c.num_experts));
  }
}

void read_kept_layers(JsonObject& json, ModelConfig& c) {
  ConfigKeys(json).integer("decoder_sparse_step", c.decoder_sparse_step, 1, kMaxLayers, false);
  const std::int64_t last = std::max(0, c.num_hidden_layers - 1);
  const auto layers = json.integers("mlp_only_layers", 0, last);
  if (!layers) return;
  for (const std::int64_t layer : *layers) c.mlp_only_layers.push_back(static_cast<int>(layer));
  std::sort(c.mlp_only_layers.begin(), c.mlp_only_layers.end());
  if (std::adjacent_find(c.mlp_only_layers.begin(), c.mlp_only_layers.end()) != c.mlp_only_layers.end())
    json.refuse("mlp_only_layers", "names a layer twice");
}

void read_shared_experts(JsonObject& json, ModelConfig& c, bool required) {
  const std::int64_t shared = json.integer("n_shared_experts", 0, kMaxExperts, required).value_or(0);
  c.shared_expert_intermediate_size = shared * c.moe_intermediate_size;
  if (c.shared_expert_intermediate_size > kMaxWidth)
    json.refuse("n_shared_experts",
                fmt::format("{} of width {} are too many", shared, c.moe_intermediate_size));
  c.shared_expert_gate = false;
}

void put_dense_layers_in_front(ModelConfig& c) {
  if (traits_of(c).has(Trait::kDenseBetween)) return;
  c.first_k_dense_replace = static_cast<int>(c.mlp_only_layers.size());
  c.mlp_only_layers.clear();
}

void require_truth(JsonObject& json, const char* key, bool expected, const char* what) {
  if (json.truth(key, false).value_or(expected) != expected)
    json.refuse(key, fmt::format("found {}; {}", !expected, what));
}

void write_kept_layers(const ModelConfig& c, JsonWriter& json) {
  json.set("decoder_sparse_step", c.decoder_sparse_step);
  std::vector<int> dense = c.mlp_only_layers;
  for (int layer = 0; layer < c.first_k_dense_replace; ++layer)
    if (!std::binary_search(c.mlp_only_layers.begin(), c.mlp_only_layers.end(), layer))
      dense.push_back(layer);
  std::sort(dense.begin(), dense.end());
  json.set("mlp_only_layers", dense);
}

void write_balance(const ModelConfig& c, JsonWriter& json) {
  json.set("router_aux_loss_coef", c.router_aux_loss_coef);
  if (!json.has("output_router_logits")) json.set("output_router_logits", false);
}

}  // namespace upmoe

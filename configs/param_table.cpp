#include "configs/param_table.h"

#include <fmt/format.h>

#include "configs/adapter_params.h"
#include "configs/expert_use.h"

namespace upmoe {
namespace {

struct Form {
  Shape shape;
  std::array<Dim, 4> dims;
};

// A SwiGLU: gate and up rows of a neuron are neighbours.
Form gate_up(const ModelConfig& c, std::int64_t width) {
  return {{width, 2, c.hidden_size}, {Dim::kFfn, Dim::kPair, Dim::kEmbed}};
}
Form down(const ModelConfig& c, std::int64_t width) {
  return {{c.hidden_size, width}, {Dim::kEmbed, Dim::kFfn}};
}

Form form_of(const ModelConfig& c, Role role) {
  const std::int64_t D = c.hidden_size, heads = c.num_attention_heads, kv = c.num_key_value_heads,
                     size = c.head_dim, E = c.num_experts, F = c.moe_intermediate_size;
  switch (role) {
    case Role::kEmbedding:
    case Role::kHead:
      return {{c.vocab_size, D}, {Dim::kVocab, Dim::kEmbed}};
    case Role::kNorm1:
    case Role::kNorm2:
    case Role::kFinalNorm:
      return {{D}, {Dim::kEmbed}};
    case Role::kQuery:
      return {{heads, size, D}, {Dim::kHeads, Dim::kHeadSize, Dim::kEmbed}};
    case Role::kKey:
    case Role::kValue:
      return {{kv, size, D}, {Dim::kKvHeads, Dim::kHeadSize, Dim::kEmbed}};
    case Role::kQueryBias:
      return {{heads, size}, {Dim::kHeads, Dim::kHeadSize}};
    case Role::kKeyBias:
    case Role::kValueBias:
      return {{kv, size}, {Dim::kKvHeads, Dim::kHeadSize}};
    case Role::kQueryNorm:
    case Role::kKeyNorm:
      return {{size}, {Dim::kHeadSize}};
    case Role::kAttentionOutput:
      return {{D, heads, size}, {Dim::kEmbed, Dim::kHeads, Dim::kHeadSize}};
    case Role::kFfnGateUp:
      return gate_up(c, c.intermediate_size);
    case Role::kFfnDown:
      return down(c, c.intermediate_size);
    // Every rank scores every expert, so the expert dim of these is not one that the expert axis cuts.
    case Role::kRouter:
    case Role::kRouterNoise:
      return {{E, D}, {Dim::kOne, Dim::kEmbed}};
    case Role::kRouterBias:
    case Role::kRouterLoad:
      return {{E}, {Dim::kOne}};
    case Role::kExpertGateUp:
      return {{E, F, 2, D}, {Dim::kExpert, Dim::kFfn, Dim::kPair, Dim::kEmbed}};
    case Role::kExpertDown:
      return {{E, D, F}, {Dim::kExpert, Dim::kEmbed, Dim::kFfn}};
    case Role::kSharedGate:
      return {{1, D}, {Dim::kOne, Dim::kEmbed}};
    case Role::kSharedGateUp:
      return gate_up(c, c.shared_expert_intermediate_size);
    case Role::kSharedDown:
      return down(c, c.shared_expert_intermediate_size);
    case Role::kAdapterA:
    case Role::kAdapterB:
      break;  // adapter_params() makes them
  }
  fail(ExitCode::kFailure, "no parameter has the role {} alone", name_of(role));
}

Init::Kind init_of(const ModelConfig& c, Role role) {
  switch (role) {
    case Role::kNorm1:
    case Role::kNorm2:
    case Role::kFinalNorm:
      return c.norm == NormKind::kRmsPlusOne ? Init::Kind::kZeros : Init::Kind::kOnes;
    case Role::kQueryNorm:
    case Role::kKeyNorm:
      return Init::Kind::kOnes;
    case Role::kQueryBias:
    case Role::kKeyBias:
    case Role::kValueBias:
    case Role::kRouterBias:
    case Role::kRouterLoad:
    case Role::kRouterNoise:
      return Init::Kind::kZeros;
    default:
      return Init::Kind::kNormal;
  }
}

// In the order of the table.
std::vector<Role> roles_of_block(const ModelConfig& c, int layer) {
  std::vector<Role> roles{Role::kNorm1, Role::kQuery, Role::kKey, Role::kValue};
  const auto add = [&](std::initializer_list<Role> more) { roles.insert(roles.end(), more); };
  if (c.qkv_bias) add({Role::kQueryBias, Role::kKeyBias, Role::kValueBias});
  if (c.qk_norm == QkNorm::kPerHead) add({Role::kQueryNorm, Role::kKeyNorm});
  add({Role::kAttentionOutput, Role::kNorm2});
  if (!c.is_moe_layer(layer)) {
    add({Role::kFfnGateUp, Role::kFfnDown});
    return roles;
  }
  add({Role::kRouter});
  if (c.router_bias) add({Role::kRouterBias});
  if (c.router_load) add({Role::kRouterLoad});
  if (c.router.kind == RouterKind::kNoisy) add({Role::kRouterNoise});
  add({Role::kExpertGateUp, Role::kExpertDown});
  if (c.shared_expert_intermediate_size == 0) return roles;
  if (c.shared_expert_gate) add({Role::kSharedGate});
  add({Role::kSharedGateUp, Role::kSharedDown});
  return roles;
}

void add_block(const ModelConfig& config, int layer, std::vector<ParamSpec>& params) {
  const std::vector<Role> roles = roles_of_block(config, layer);
  for (const Role role : roles) params.push_back(make_param(config, role, layer));
  for (const Role role : roles)
    for (ParamSpec& adapter : adapter_params(config, role, layer)) params.push_back(std::move(adapter));
}

}  // namespace

std::string param_name(Role role, int layer) {
  return layer == kOutsideBlocks ? name_of(role) : fmt::format("layers.{}.{}", layer, name_of(role));
}

ParamSpec make_param(const ModelConfig& config, Role role, int layer) {
  ParamSpec spec;
  spec.name = param_name(role, layer);
  spec.role = role;
  const Form form = form_of(config, role);
  spec.shape = form.shape;
  spec.dims = form.dims;
  spec.layer = layer;
  spec.expert = role == Role::kExpertGateUp || role == Role::kExpertDown;
  spec.init = {init_of(config, role), static_cast<float>(config.initializer_range)};
  // Weight decay for matrices, none for norms and biases.
  spec.decay = spec.init.kind == Init::Kind::kNormal || role == Role::kRouterNoise;
  spec.tied = role == Role::kEmbedding && config.tie_word_embeddings;
  // q, k and v lie behind each other in memory and are one product; so do their biases.
  spec.joins_previous =
      role == Role::kKey || role == Role::kValue || role == Role::kKeyBias || role == Role::kValueBias;
  spec.trained = role != Role::kRouterBias && role != Role::kRouterLoad;
  spec.fp32 = !spec.trained;
  spec.added = !spec.trained || role == Role::kRouterNoise;
  return spec;
}

int first_input_dim(const ParamSpec& weight) {
  int d = weight.expert ? 1 : 0;
  // Heads and their size are outputs of queries, keys and values together.
  d += weight.dims[static_cast<std::size_t>(d) + 1] == Dim::kHeadSize ? 2 : 1;
  return d + (weight.dims[static_cast<std::size_t>(d)] == Dim::kPair ? 1 : 0);
}

std::vector<ParamSpec> make_param_table(const ModelConfig& config) {
  UPMOE_CHECK(config.num_hidden_layers > 0 && config.head_dim > 0, "the model config is not filled in");
  std::vector<ParamSpec> params{make_param(config, Role::kEmbedding)};
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) add_block(config, layer, params);
  params.push_back(make_param(config, Role::kFinalNorm));
  if (!config.tie_word_embeddings) params.push_back(make_param(config, Role::kHead));
  return params;
}

std::vector<Role> fp32_roles(RouterDType router) {
  return router == RouterDType::kFp32 ? std::vector<Role>{Role::kRouter, Role::kRouterNoise}
                                      : std::vector<Role>{};
}

ParamCounts count_params(const ModelConfig& config) {
  ParamCounts counts;
  const ExpertUse use = expert_use(config);
  for (const ParamSpec& param : make_param_table(config)) {
    const std::int64_t all = param.shape.elements();
    if (!param.trained) {
      counts.buffers = checked_add(counts.buffers, all);
      continue;
    }
    // Expert tensors have the expert dim first, so the share of top-k is exact.
    const std::int64_t used = param.expert ? all / param.shape[0] * use.rows / use.tokens : all;
    const bool token_table = param.dims[0] == Dim::kVocab;  // embedding or head
    counts.total = checked_add(counts.total, all);
    counts.activated = checked_add(counts.activated, used);
    if (!token_table) counts.activated_non_embedding = checked_add(counts.activated_non_embedding, used);
  }
  return counts;
}

}  // namespace upmoe

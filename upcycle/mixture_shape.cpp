#include "upcycle/mixture_shape.h"

namespace upmoe {
namespace {

std::optional<bool> gate_of(SharedGate gate) {
  if (gate == SharedGate::kAuto) return std::nullopt;
  return gate == SharedGate::kSigmoid;
}

}  // namespace

WantedMixture wanted_mixture(const UpcycleConfig& config, const ModelConfig& dense) {
  WantedMixture wanted{dense, config.target.family, gate_of(config.shared.gate)};
  ModelConfig& moe = wanted.shape;
  moe.num_experts = config.target.num_experts;
  moe.num_experts_per_tok = config.target.num_experts_per_tok;
  moe.moe_intermediate_size = config.target.moe_intermediate_size;
  moe.shared_expert_intermediate_size = config.target.shared_expert_intermediate_size;
  moe.norm_topk_prob = config.target.norm_topk_prob;
  moe.decoder_sparse_step = 1;
  moe.first_k_dense_replace = 0;
  moe.mlp_only_layers = dense_layers(config.target.layers, dense.num_hidden_layers);
  return wanted;
}

ModelConfig make_moe_config(const UpcycleConfig& config, const ModelConfig& dense) {
  const WantedMixture wanted = wanted_mixture(config, dense);
  const MixtureChoice choice = choose_mixture(family_of(dense), wanted);
  if (choice.family == nullptr) fail(ExitCode::kUsage, "{}: {}", config.origin, choice.problem);
  return in_form_of(*choice.family, wanted);
}

}  // namespace upmoe

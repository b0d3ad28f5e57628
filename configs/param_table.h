#pragma once
// The one list of every parameter: role, name, global shape, what each dim means, how it is initialised. Memory,
// binding, optimizer groups, checkpoint, upcycling and documentation all read this list.
//
// Names (stable for ever, they are on disk; i = layer) follow from the block and the role:
//   embed_VD [V,D]
//   layers.i.norm1_D · layers.i.attn.{q,k,v}_NHD [heads,head,D] · layers.i.attn.{q,k,v}_NH (biases)
//   layers.i.attn.{q,k}_norm_H [head] (norms of each head)
//   layers.i.attn.o_DNH [D,heads,head] · layers.i.norm2_D
//   layers.i.ffn.gate_up_F2D [F,2,D] · layers.i.ffn.down_DF                                   dense blocks
//   layers.i.moe.router_ED · layers.i.moe.router_E, .load_E (buffers) · layers.i.moe.gate_up_EF2D [E,F,2,D] ·
//   layers.i.moe.down_EDF [E,D,F]                                                               mixtures
//   layers.i.shared.gate_1D · layers.i.shared.gate_up_F2D · layers.i.shared.down_DF
//   norm_D · head_VD (untied only)
// and those of low-rank adapters (adapter_params.h), behind the others of their block.
// In the table q, k, v weights are neighbours in this order, then the three biases: a flat buffer in table
// order holds one contiguous [qkv, D] matrix.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/names.h"
#include "configs/run_choices.h"
#include "kernels/core/tensor.h"

namespace upmoe {

// What a parameter is in its block, or in front of and behind the blocks.
enum class Role : std::uint8_t {
  kEmbedding,
  kNorm1,
  kQuery,
  kKey,
  kValue,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kQueryNorm,
  kKeyNorm,
  kAttentionOutput,
  kNorm2,
  kFfnGateUp,
  kFfnDown,
  kRouter,
  kRouterBias,
  kRouterLoad,
  kRouterNoise,
  kExpertGateUp,
  kExpertDown,
  kSharedGate,
  kSharedGateUp,
  kSharedDown,
  kFinalNorm,
  kHead,
  kAdapterA,  // of whichever weight (ParamSpec::adapts)
  kAdapterB
};
template <>
inline constexpr Names<Role> kNames<Role>{.built = {{Role::kEmbedding, "embed_VD"},
                                                    {Role::kNorm1, "norm1_D"},
                                                    {Role::kQuery, "attn.q_NHD"},
                                                    {Role::kKey, "attn.k_NHD"},
                                                    {Role::kValue, "attn.v_NHD"},
                                                    {Role::kQueryBias, "attn.q_NH"},
                                                    {Role::kKeyBias, "attn.k_NH"},
                                                    {Role::kValueBias, "attn.v_NH"},
                                                    {Role::kQueryNorm, "attn.q_norm_H"},
                                                    {Role::kKeyNorm, "attn.k_norm_H"},
                                                    {Role::kAttentionOutput, "attn.o_DNH"},
                                                    {Role::kNorm2, "norm2_D"},
                                                    {Role::kFfnGateUp, "ffn.gate_up_F2D"},
                                                    {Role::kFfnDown, "ffn.down_DF"},
                                                    {Role::kRouter, "moe.router_ED"},
                                                    {Role::kRouterBias, "moe.router_E"},
                                                    {Role::kRouterLoad, "moe.load_E"},
                                                    {Role::kRouterNoise, "moe.noise_ED"},
                                                    {Role::kExpertGateUp, "moe.gate_up_EF2D"},
                                                    {Role::kExpertDown, "moe.down_EDF"},
                                                    {Role::kSharedGate, "shared.gate_1D"},
                                                    {Role::kSharedGateUp, "shared.gate_up_F2D"},
                                                    {Role::kSharedDown, "shared.down_DF"},
                                                    {Role::kFinalNorm, "norm_D"},
                                                    {Role::kHead, "head_VD"},
                                                    {Role::kAdapterA, "lora_A"},
                                                    {Role::kAdapterB, "lora_B"}}};

inline constexpr int kOutsideBlocks = -1;

enum class Dim : std::uint8_t { kEmbed, kHeads, kKvHeads, kHeadSize, kFfn, kVocab, kExpert, kPair, kOne };

// kUniform: within +-size.
struct Init {
  enum class Kind { kNormal, kOnes, kZeros, kUniform } kind = Kind::kNormal;
  float size = 0.02f;  // kNormal: the standard deviation
};

// Gate and up of a neuron are one parameter here and two tensors on disk.
enum class Half : std::uint8_t { kWhole, kGate, kUp };

// What a low-rank adapter stands beside, and which of its two matrices a parameter is.
struct AdaptedPart {
  Role role = Role::kQuery;
  Half half = Half::kWhole;
  friend bool operator==(const AdaptedPart&, const AdaptedPart&) = default;
};
enum class AdapterFactor : std::uint8_t { kA, kB };
struct Adapts {
  AdaptedPart part;
  AdapterFactor factor = AdapterFactor::kA;
};

struct ParamSpec {
  std::string name;
  Role role = Role::kEmbedding;
  Shape shape;  // GLOBAL
  std::array<Dim, 4> dims{};
  int layer = kOutsideBlocks;  // block index; outside: first or last pipeline stage
  bool expert = false;         // one of the routed experts' tensors: replicated along edp instead of dp x cp
  bool decay = true;           // matrices decay; norms and biases do not
  bool tied = false;           // embed_VD when it is the head as well: first and last pipeline stage hold it
  // One product with its neighbour in the table: it follows it in memory without a gap.
  bool joins_previous = false;
  // Value and gradient are fp32 beside weights of any precision; its layer widens the rows of its product.
  bool fp32 = false;
  // False: a buffer, which something other than the optimizer changes, alike on all ranks that hold it. It has neither
  // gradient nor moments, and is saved and loaded like a parameter.
  bool trained = true;
  // Only training needs it, as all buffers: few families have a tensor for it, and where a model that a run starts
  // from has none, it begins as `init` says.
  bool added = false;
  Init init;
  std::optional<Adapts> adapts = {};  // of a low-rank adapter alone
};

// Of a weight, the first of the dims that are its product's input: those before it are experts, outputs and halves.
int first_input_dim(const ParamSpec& weight);

std::vector<ParamSpec> make_param_table(const ModelConfig& config);  // pure; dense and MoE alike
// One parameter as the table would have it, whether or not this model has it.
ParamSpec make_param(const ModelConfig& config, Role role, int layer = kOutsideBlocks);
std::string param_name(Role role, int layer = kOutsideBlocks);

// Roles that a run keeps in fp32 beside the table's own.
std::vector<Role> fp32_roles(RouterDType router);

// Of what is trained.
struct ParamCounts {
  std::int64_t total = 0;      // every parameter once
  std::int64_t activated = 0;  // routed experts counted as a token uses them on the mean: top-k of E
  std::int64_t activated_non_embedding = 0;  // without input embedding and LM head
  std::int64_t buffers = 0;                  // values that are not trained, in none of the others
};
ParamCounts count_params(const ModelConfig& config);  // from the table, no formula of its own

}  // namespace upmoe

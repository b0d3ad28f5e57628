#include "trainer/model/make_transformer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "configs/adapter_params.h"
#include "configs/expert_use.h"
#include "kernels/core/bf16.h"
#include "trainer/model/capacity_router.h"
#include "trainer/model/expert_choice_router.h"
#include "trainer/model/jitter_router.h"
#include "trainer/model/noisy_router.h"
#include "trainer/model/scaled_router.h"
#include "trainer/model/second_choice_router.h"
#include "trainer/model/sigmoid_router.h"
#include "trainer/model/softmax_router.h"
#include "trainer/model/token_mixture_router.h"

namespace upmoe {

namespace {

// What a model asks for and no layer computes. A field that nothing here read would be left out without a word.
void refuse_missing_layers(const ModelConfig& c) {
  std::vector<std::string> missing;
  if (c.num_experts > 0 && c.activation != Activation::kSilu)
    missing.push_back(fmt::format("activation = {} in experts", name_of(c.activation)));
  if (c.router.kind != RouterKind::kTopK && c.router.score != RouterScore::kSoftmax)
    missing.push_back(
        fmt::format("routers of kind {} with score {}", name_of(c.router.kind), name_of(c.router.score)));
  if (c.router.kind == RouterKind::kGShard && c.num_moe_layers() > 0 && c.num_experts_per_tok != 2)
    missing.push_back(fmt::format("routers of kind gshard with {} choices", c.num_experts_per_tok));
  const bool mixes = c.router.kind == RouterKind::kMixtureOfTokens;
  if (mixes && (c.router.jitter != 0 || c.router.scale != 1))
    missing.push_back("routers of kind mixture_of_tokens with a jitter or a scale");
  if (c.routes_groups() && c.router.group_size < 1)
    missing.push_back(fmt::format("routers of kind {} without a group_size", name_of(c.router.kind)));
  if (missing.empty()) return;
  fail(ExitCode::kUsage, "a model of type {} cannot be built: no layer computes {}; take a model without it",
       c.model_type, fmt::join(missing, ", "));
}

// The parameters of one block, by their roles.
struct BlockParams {
  const ParamStore& store;
  int layer;
  Shape shard(Role role) const { return store.at(param_name(role, layer)).shard.extent; }
  Param get(Role role, Shape shape) const { return store.param(param_name(role, layer), shape); }
  Param joined(std::initializer_list<Role> roles, Shape shape) const {
    std::vector<std::string> names;
    for (const Role role : roles) names.push_back(param_name(role, layer));
    return store.joined(names, shape);
  }
};

// A part of a product that may have an adapter, and where in the product's rows its own lie.
struct AdapterPlace {
  AdaptedPart part;
  std::int64_t first = 0, step = 1;
};

// A factor as its product reads it, as a matrix, of experts as one for each: a is [L, K], b [N, L].
Param bind_factor(const BlockParams& params, const std::string& name, AdapterFactor factor) {
  const StoredParam& p = params.store.at(name);
  const Shape& at = p.shard.extent;
  const int first = p.spec.expert ? 1 : 0;
  // By the dims, as a rank without experts has no elements to divide.
  std::int64_t inside = 1;
  for (int d = first; d < at.rank; ++d) inside *= at[d];
  const bool is_a = factor == AdapterFactor::kA;
  const std::int64_t experts = p.spec.expert ? at[0] : 1, rank = at[is_a ? first : -1],
                     other = rank == 0 ? 0 : inside / rank;
  const std::int64_t rows = is_a ? rank : other, columns = is_a ? other : rank;
  return params.store.param(name, p.spec.expert ? Shape{experts, rows, columns} : Shape{rows, columns});
}

// Of a product with `rows` rows, if any of its parts has one.
std::optional<Adapter> bind_adapter(const ModelConfig& config, const BlockParams& params, std::int64_t rows,
                                    std::initializer_list<AdapterPlace> places) {
  Adapter adapter;
  for (const AdapterPlace& place : places) {
    const std::string a = adapter_name(place.part, AdapterFactor::kA, params.layer),
                      b = adapter_name(place.part, AdapterFactor::kB, params.layer);
    if (!params.store.has(a)) continue;
    adapter.modules.push_back({bind_factor(params, a, AdapterFactor::kA),
                               bind_factor(params, b, AdapterFactor::kB), place.first, place.step});
  }
  if (adapter.modules.empty()) return std::nullopt;
  adapter.rows = rows;
  adapter.scale = static_cast<float>(config.lora.scale());
  return adapter;
}

// Gate and up rows take turns.
std::optional<Adapter> bind_gate_up_adapter(const ModelConfig& config, const BlockParams& params, Role role,
                                            std::int64_t neurons) {
  return bind_adapter(config, params, 2 * neurons, {{{role, Half::kGate}, 0, 2}, {{role, Half::kUp}, 1, 2}});
}

std::optional<Adapter> bind_whole_adapter(const ModelConfig& config, const BlockParams& params, Role role,
                                          std::int64_t rows) {
  return bind_adapter(config, params, rows, {{{role, Half::kWhole}}});
}

Norm make_norm(const ModelConfig& config, const Param& weight_D) {
  return {weight_D, static_cast<float>(config.rms_norm_eps), config.norm};
}

// sqrt(D) as a number of the embedding's dtype: 55.5 for 3072 in bf16.
float embedding_scale(const ModelConfig& config, DType dtype) {
  if (!config.scaled_embedding) return 1;
  const auto root = static_cast<float>(std::sqrt(static_cast<double>(config.hidden_size)));
  return dtype == DType::kBF16 ? to_float(to_bf16(root)) : root;
}

// Gate and up rows of a neuron are neighbours in memory: [F, 2, D] is read as a matrix of 2 F rows, one product.
DenseFfn bind_ffn(const ModelConfig& config, const BlockParams& params, const ProcessMesh& mesh, Role gate_up,
                  Role down, Keep keeps) {
  const Shape F2D = params.shard(gate_up);
  DenseFfn ffn;
  ffn.activation = config.activation;
  ffn.tp = &mesh.along(Axis::kTp);
  ffn.gate_up.weight_NK = params.get(gate_up, {F2D[0] * 2, F2D[2]});
  ffn.down.weight_NK = params.get(down, {F2D[2], F2D[0]});
  ffn.gate_up.adapter = bind_gate_up_adapter(config, params, gate_up, F2D[0]);
  ffn.down.adapter = bind_whole_adapter(config, params, down, F2D[2]);
  ffn.keeps = keeps;
  return ffn;
}

std::unique_ptr<const Router> scaled(std::unique_ptr<const Router> router, double factor) {
  return factor == 1 ? std::move(router) : make_scaled_router(std::move(router), factor);
}

// Of softmax scores.
std::unique_ptr<const Router> bind_kind(const ModelConfig& config, const BlockParams& params,
                                        const RouterProduct& product) {
  const std::int64_t K = config.num_experts_per_tok;
  const bool renormalize = config.norm_topk_prob;
  switch (config.router.kind) {
    case RouterKind::kTopK:
    case RouterKind::kSwitch:
      return make_softmax_router(product, K, renormalize);
    case RouterKind::kNoisy:
      return make_noisy_router(product,
                               {params.get(Role::kRouterNoise, {config.num_experts, config.hidden_size})}, K,
                               renormalize);
    case RouterKind::kGShard:
      return make_second_choice_router(make_softmax_router(product, K, renormalize));
    case RouterKind::kExpertChoice:
      return make_expert_choice_router(product, choices_on_the_mean(config));
    case RouterKind::kMixtureOfTokens:
      return make_token_mixture_router(product, config.router.temperature);
  }
  fail(ExitCode::kFailure, "no router of this kind");
}

// Without what training does to its input, and to its choices whatever they are.
std::unique_ptr<const Router> bind_choices(const ModelConfig& config, const BlockParams& params) {
  const std::int64_t E = config.num_experts, K = config.num_experts_per_tok;
  const RouterProduct product{params.get(Role::kRouter, {E, config.hidden_size})};
  const RouterForm& form = config.router;
  switch (form.score) {
    case RouterScore::kSoftmax:
      return scaled(bind_kind(config, params, product), form.scale);
    case RouterScore::kSigmoid: {
      const SigmoidRule rule{form.groups, form.group_topk, config.norm_topk_prob,
                             static_cast<float>(form.scale)};
      const ConstTensorView bias_E =
          config.router_bias ? params.get(Role::kRouterBias, {E}).value : ConstTensorView{};
      return make_sigmoid_router(product, bias_E, K, rule);
    }
  }
  fail(ExitCode::kFailure, "no router of this score");
}

std::unique_ptr<const Router> bind_router(const ModelConfig& config, const BlockParams& params) {
  std::unique_ptr<const Router> router = bind_choices(config, params);
  const RouterForm& form = config.router;
  if (form.capacity_factor > 0 && !form.routes_groups())
    router = make_capacity_router(std::move(router),
                                  {config.num_experts, form.capacity_factor, form.capacity_pool, form.drop});
  if (form.jitter > 0) router = make_jitter_router(std::move(router), form.jitter);
  return router;
}

MoeLayer bind_moe(const ModelConfig& config, const BlockParams& params, const ProcessMesh& mesh,
                  const KeepOfKinds& keeps) {
  MoeLayer moe;
  moe.num_experts = config.num_experts;
  moe.router = bind_router(config, params);
  moe.exchange = make_exchange({config.num_experts, mesh.spec().etp}, mesh.along({Axis::kEp, Axis::kEtp}),
                               {mesh.across_nodes(), mesh.inside_node()});
  const Shape eF2D = params.shard(Role::kExpertGateUp);
  moe.experts = {params.get(Role::kExpertGateUp, {eF2D[0], eF2D[1] * 2, eF2D[3]}),
                 params.get(Role::kExpertDown, {eF2D[0], eF2D[3], eF2D[1]}), keeps.routed,
                 bind_gate_up_adapter(config, params, Role::kExpertGateUp, eF2D[1]),
                 bind_whole_adapter(config, params, Role::kExpertDown, eF2D[3])};
  if (config.shared_expert_intermediate_size > 0) {
    moe.shared = bind_ffn(config, params, mesh, Role::kSharedGateUp, Role::kSharedDown, keeps.dense);
    if (config.shared_expert_gate)
      moe.shared->gate_1D = params.get(Role::kSharedGate, {1, config.hidden_size});
  }
  return moe;
}

AttentionLayer bind_attention(const ModelConfig& config, const BlockParams& params, const ProcessMesh& mesh) {
  AttentionLayer attention;
  attention.tp = &mesh.along(Axis::kTp);
  attention.cp = &mesh.along(Axis::kCp);
  attention.shape = {params.shard(Role::kQuery)[0], params.shard(Role::kKey)[0], config.head_dim, 0,
                     config.sliding_window};
  attention.rope_theta = config.rope_theta;
  attention.clip = static_cast<float>(config.clip_qkv);
  const std::int64_t H = attention.shape.qkv_width(), Q = attention.shape.heads * config.head_dim;
  attention.qkv.weight_NK = params.joined({Role::kQuery, Role::kKey, Role::kValue}, {H, config.hidden_size});
  if (config.qkv_bias)
    attention.qkv.bias_N = params.joined({Role::kQueryBias, Role::kKeyBias, Role::kValueBias}, {H});
  if (config.qk_norm == QkNorm::kPerHead)
    attention.head_norms =
        HeadNorms{params.get(Role::kQueryNorm, {config.head_dim}),
                  params.get(Role::kKeyNorm, {config.head_dim}), static_cast<float>(config.rms_norm_eps)};
  attention.output.weight_NK = params.get(Role::kAttentionOutput, {config.hidden_size, Q});
  const std::int64_t KV = attention.shape.kv_heads * config.head_dim;
  attention.qkv.adapter = bind_adapter(
      config, params, H, {{{Role::kQuery}, 0, 1}, {{Role::kKey}, Q, 1}, {{Role::kValue}, Q + KV, 1}});
  attention.output.adapter = bind_whole_adapter(config, params, Role::kAttentionOutput, config.hidden_size);
  return attention;
}

Block bind_block(const ModelConfig& config, const BlockParams& params, const ProcessMesh& mesh,
                 Recompute recompute) {
  const KeepOfKinds keeps = keep_of(recompute);
  Block block;
  block.recompute = recompute;
  block.norm1 = make_norm(config, params.get(Role::kNorm1, {config.hidden_size}));
  block.norm2 = make_norm(config, params.get(Role::kNorm2, {config.hidden_size}));
  block.attention = bind_attention(config, params, mesh);
  if (config.is_moe_layer(params.layer)) {
    block.ffn = bind_moe(config, params, mesh, keeps);
  } else {
    block.ffn = bind_ffn(config, params, mesh, Role::kFfnGateUp, Role::kFfnDown, keeps.dense);
  }
  return block;
}

VocabShard shard_of_vocab(const StoredParam& p) {
  return {p.shard.offset[0], p.spec.shape[0]};
}

OutputHead bind_output(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh) {
  const StoredParam& table =
      params.at(param_name(config.tie_word_embeddings ? Role::kEmbedding : Role::kHead));
  OutputHead output;
  output.norm = make_norm(config, params.param(param_name(Role::kFinalNorm), {config.hidden_size}));
  output.head.weight_VD = table.whole();
  output.head.shard = shard_of_vocab(table);
  output.head.tp = &mesh.along(Axis::kTp);
  return output;
}

// Of the first chunk's blocks the first one that backward must reach: before it nothing trains.
std::size_t first_trained_block(const ParamStore& params, const Range& blocks) {
  std::int64_t first = blocks.size();
  for (const StoredParam& p : params.all()) {
    if (!p.trains()) continue;
    if (p.spec.role == Role::kEmbedding) return 0;
    if (p.spec.layer >= 0) first = std::min<std::int64_t>(first, p.spec.layer - blocks.begin);
  }
  return static_cast<std::size_t>(std::max<std::int64_t>(first, 0));
}

}  // namespace

Transformer make_transformer(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                             const StagePlan& plan, std::size_t chunk, Recompute recompute) {
  refuse_missing_layers(config);
  const Range blocks = plan.chunks[chunk];
  Transformer model;
  model.hidden_size = config.hidden_size;
  model.dtype = params.compute_dtype();
  model.tp = &mesh.along(Axis::kTp);
  model.pool = &mesh.along({Axis::kCp, Axis::kTp});
  model.first_block = static_cast<int>(blocks.begin);
  if (chunk == 0) {
    const StoredParam& table = params.at(param_name(Role::kEmbedding));
    model.embedding =
        Embedding{table.whole(), shard_of_vocab(table), embedding_scale(config, table.value.dtype)};
    model.first_trained = first_trained_block(params, blocks);
  }
  for (std::int64_t i = blocks.begin; i < blocks.end; ++i)
    model.blocks.push_back(bind_block(config, {params, static_cast<int>(i)}, mesh, recompute));
  if (chunk + 1 == plan.chunks.size()) model.output = bind_output(config, params, mesh);
  return model;
}

std::vector<Transformer> make_chunks(const ModelConfig& config, const ParamStore& params,
                                     const ProcessMesh& mesh, const StagePlan& plan, Recompute recompute) {
  std::vector<Transformer> chunks;
  for (std::size_t c = 0; c < plan.chunks.size(); ++c)
    if (static_cast<int>(c) % plan.stages == mesh.coord(Axis::kPp))
      chunks.push_back(make_transformer(config, params, mesh, plan, c, recompute));
  return chunks;
}

}  // namespace upmoe

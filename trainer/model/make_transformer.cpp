// From named parameters and groups of ranks to layers.

#include "parallel/stage_plan.h"
#include "trainer/model/transformer.h"

namespace upmoe {

namespace {

DenseFfn bind_ffn(const ParamStore& params, const ProcessMesh& mesh, const std::string& prefix, Keep keeps) {
  const Shape gate_up = params.at(prefix + "gate_up_F2D").shard.extent;
  DenseFfn ffn;
  ffn.tp = &mesh.along(Axis::kTp);
  ffn.gate_up.weight_NK = params.param(prefix + "gate_up_F2D", {gate_up[0] * 2, gate_up[2]});
  ffn.down.weight_NK = params.param(prefix + "down_DF", {gate_up[2], gate_up[0]});
  ffn.keeps = keeps;
  return ffn;
}

MoeLayer bind_moe(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                  const std::string& layer, const KeepOfKinds& keeps) {
  MoeLayer moe;
  moe.num_experts = config.num_experts;
  moe.router =
      make_softmax_router(params.param(layer + "moe.router_ED", {config.num_experts, config.hidden_size}),
                          config.num_experts_per_tok, config.norm_topk_prob);
  moe.exchange = make_exchange({config.num_experts, mesh.spec().etp}, mesh.along({Axis::kEp, Axis::kEtp}),
                               {mesh.across_nodes(), mesh.inside_node()});
  const Shape eF2D = params.at(layer + "moe.gate_up_EF2D").shard.extent;
  moe.experts = {params.param(layer + "moe.gate_up_EF2D", {eF2D[0], eF2D[1] * 2, eF2D[3]}),
                 params.param(layer + "moe.down_EDF", {eF2D[0], eF2D[3], eF2D[1]}), keeps.routed};
  if (params.has(layer + "shared.gate_up_F2D")) {
    moe.shared = bind_ffn(params, mesh, layer + "shared.", keeps.dense);
    moe.shared->gate_1D = params.param(layer + "shared.gate_1D", {1, config.hidden_size});
  }
  return moe;
}

AttentionLayer bind_attention(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                              const std::string& layer) {
  const std::string at = layer + "attn.";
  AttentionLayer attention;
  attention.tp = &mesh.along(Axis::kTp);
  attention.cp = &mesh.along(Axis::kCp);
  attention.shape = {params.at(at + "q_NHD").shard.extent[0], params.at(at + "k_NHD").shard.extent[0],
                     config.head_dim, 0};
  attention.rope_theta = config.rope_theta;
  const std::int64_t H = attention.shape.qkv_width(), Q = attention.shape.heads * config.head_dim;
  attention.qkv.weight_NK =
      params.joined({at + "q_NHD", at + "k_NHD", at + "v_NHD"}, {H, config.hidden_size});
  if (config.qkv_bias) attention.qkv.bias_N = params.joined({at + "q_NH", at + "k_NH", at + "v_NH"}, {H});
  attention.output.weight_NK = params.param(at + "o_DNH", {config.hidden_size, Q});
  return attention;
}

Block bind_block(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh, int i,
                 Recompute recompute) {
  const auto eps = static_cast<float>(config.rms_norm_eps);
  const std::string layer = fmt::format("layers.{}.", i);
  const KeepOfKinds keeps = keep_of(recompute);
  Block block;
  block.recompute = recompute;
  block.norm1 = {params.param(layer + "norm1_D", {config.hidden_size}), eps};
  block.norm2 = {params.param(layer + "norm2_D", {config.hidden_size}), eps};
  block.attention = bind_attention(config, params, mesh, layer);
  if (config.is_moe_layer(i)) {
    block.ffn = bind_moe(config, params, mesh, layer, keeps);
  } else {
    block.ffn = bind_ffn(params, mesh, layer + "ffn.", keeps.dense);
  }
  return block;
}

VocabShard shard_of_vocab(const StoredParam& p) {
  return {p.shard.offset[0], p.spec.shape[0]};
}

OutputHead bind_output(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh) {
  const StoredParam& table = params.at(config.tie_word_embeddings ? "embed_VD" : "head_VD");
  OutputHead output;
  output.norm = {params.param("norm_D", {config.hidden_size}), static_cast<float>(config.rms_norm_eps)};
  output.head.weight_VD = {table.value, table.grad};
  output.head.shard = shard_of_vocab(table);
  output.head.tp = &mesh.along(Axis::kTp);
  return output;
}

}  // namespace

Transformer make_transformer(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                             const StagePlan& plan, std::size_t chunk, Recompute recompute) {
  const Range blocks = plan.chunks[chunk];
  Transformer model;
  model.hidden_size = config.hidden_size;
  model.dtype = params.dtype();
  model.tp = &mesh.along(Axis::kTp);
  model.pool = &mesh.along({Axis::kCp, Axis::kTp});
  model.first_block = static_cast<int>(blocks.begin);
  if (chunk == 0) {
    const StoredParam& table = params.at("embed_VD");
    model.embedding = Embedding{{table.value, table.grad}, shard_of_vocab(table)};
  }
  for (std::int64_t i = blocks.begin; i < blocks.end; ++i)
    model.blocks.push_back(bind_block(config, params, mesh, static_cast<int>(i), recompute));
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

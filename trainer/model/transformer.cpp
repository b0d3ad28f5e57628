#include "trainer/model/transformer.h"

#include <cstring>

#include "kernels/ops/embedding.h"

namespace upmoe {

namespace {

// One fp64 on the device that ops add to.
TensorView loss_sum(Exec& ex) {
  TensorView sum_1 = ex.scratch->take({1}, DType::kF64, "loss sum");
  if (sum_1.data != nullptr) *sum_1.as<double>() = 0.0;
  return sum_1;
}

double value_of(TensorView sum_1) {
  return sum_1.data != nullptr ? *sum_1.as<double>() : 0.0;
}

// Values and gradients of the balance terms, once every layer's load is known; gradients go where backward
// finds them.
void set_balance(Exec& ex, const BalanceConfig& config, std::int64_t tokens, Arena& keep,
                 Transformer::Saved& saved) {
  std::vector<LayerLoad> loads;
  std::vector<Block::Saved*> moe;
  for (Block::Saved& b : saved.blocks) {
    if (!std::holds_alternative<MoeLayer::Saved>(b.ffn)) continue;
    moe.push_back(&b);
    const std::size_t E = b.load_3E.size() / 3;
    const std::span<const double> all(b.load_3E);
    loads.push_back({tokens, all.subspan(0, E), all.subspan(E, E), all.subspan(2 * E, E), b.z_sum});
  }
  if (ex.device.type ==
      DeviceType::kDry) {  // nothing was counted; backward still wants a tensor of the right shape
    for (Block::Saved* b : moe) {
      const std::int64_t E = std::get<MoeLayer::Saved>(b->ffn).probs_TE.shape[1];
      b->aux_E = keep.take({E}, DType::kF32, "balance gradient");
    }
    return;
  }
  saved.balance = balance_terms(config, loads);
  for (std::size_t i = 0; i < moe.size(); ++i) {
    const std::vector<float>& gradient = saved.balance.aux_gradient[i];
    moe[i]->aux_E = keep.take({static_cast<std::int64_t>(gradient.size())}, DType::kF32, "balance gradient");
    std::memcpy(moe[i]->aux_E.data, gradient.data(), moe[i]->aux_E.bytes());
    moe[i]->z_scale = saved.balance.z_scale[i];
  }
}

}  // namespace

double Transformer::forward(Exec& ex, const MicroBatch& batch, double loss_scale,
                            const BalanceConfig& balance, Arena& keep, Saved& saved) const {
  const std::int64_t T = batch.tokens_T.rows(), D = embed_VD.value.shape[1];
  saved.blocks.assign(blocks.size(), {});
  saved.tokens_T = batch.tokens_T;
  TensorView x_TD = keep.take({T, D}, dtype, "embedding");
  ops::embedding_forward(ex, x_TD, batch.tokens_T, embed_VD.value);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    TensorView y_TD = keep.take({T, D}, dtype, "block output");
    blocks[i].forward(ex, y_TD, x_TD, batch.places, keep, saved.blocks[i]);
    x_TD = y_TD;
  }
  set_balance(ex, balance, T, keep, saved);
  saved.dnormed_TD = keep.take({T, D}, dtype, "final norm gradient");
  ScratchScope scope(*ex.scratch);
  TensorView normed_TD = ex.scratch->take({T, D}, dtype, "final norm output");
  final_norm.forward(ex, normed_TD, x_TD, keep, saved.final_norm);
  TensorView loss_1 = loss_sum(ex);
  head.forward(ex, loss_1, normed_TD, batch.targets_T, &saved.dnormed_TD, static_cast<float>(loss_scale));
  return value_of(loss_1);
}

void Transformer::backward(Exec& ex, Arena& keep, Saved& saved,
                           const std::function<void(int)>& layer_done) const {
  ScratchScope scope(*ex.scratch);
  TensorView g_TD = ex.scratch->take(saved.dnormed_TD.shape, dtype, "residual stream gradient");
  final_norm.backward(ex, g_TD, Accumulate::kOverwrite, saved.dnormed_TD, saved.final_norm);
  for (std::size_t i = blocks.size(); i-- > 0;) {
    blocks[i].backward(ex, g_TD, keep, saved.blocks[i]);
    if (layer_done) layer_done(static_cast<int>(i));
  }
  if (embed_VD.wants_grad()) ops::embedding_backward(ex, embed_VD.grad, g_TD, saved.tokens_T);
  if (layer_done) layer_done(-1);
}

double Transformer::evaluate(Exec& ex, const MicroBatch& batch, Arena& keep, const LmHead::Sink& sink) const {
  const std::int64_t T = batch.tokens_T.rows(), D = embed_VD.value.shape[1];
  const std::size_t before = keep.mark();
  TensorView x_TD = keep.take({T, D}, dtype, "block input"), y_TD = keep.take({T, D}, dtype, "block output");
  ops::embedding_forward(ex, x_TD, batch.tokens_T, embed_VD.value);
  for (const Block& block : blocks) {
    const std::size_t mark = keep.mark();
    Block::Saved saved;
    block.forward(ex, y_TD, x_TD, batch.places, keep, saved);
    keep.rewind(mark);
    std::swap(x_TD, y_TD);
  }
  RmsNorm::Saved saved;
  final_norm.forward(ex, y_TD, x_TD, keep, saved);
  ScratchScope scope(*ex.scratch);
  TensorView loss_1 = loss_sum(ex);
  head.forward(ex, loss_1, y_TD, batch.targets_T, nullptr, 0.0f, sink);
  keep.rewind(before);
  return value_of(loss_1);
}

namespace {

DenseFfn bind_ffn(const ParamStore& params, const std::string& prefix) {
  const Shape gate_up = params.at(prefix + "gate_up_F2D").shard.extent;
  DenseFfn ffn;
  ffn.gate_up.weight_NK = params.param(prefix + "gate_up_F2D", {gate_up[0] * 2, gate_up[2]});
  ffn.down.weight_NK = params.param(prefix + "down_DF", {gate_up[2], gate_up[0]});
  return ffn;
}

MoeLayer bind_moe(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                  const std::string& layer) {
  MoeLayer moe;
  moe.num_experts = config.num_experts;
  moe.top_k = config.num_experts_per_tok;
  moe.renormalize_top_k = config.norm_topk_prob;
  moe.ep = &mesh.along(Axis::kEp);
  const Shape eF2D = params.at(layer + "moe.gate_up_EF2D").shard.extent;
  moe.router_ED = params.param(layer + "moe.router_ED", {config.num_experts, config.hidden_size});
  moe.gate_up_eGD = params.param(layer + "moe.gate_up_EF2D", {eF2D[0], eF2D[1] * 2, eF2D[3]});
  moe.down_eDF = params.param(layer + "moe.down_EDF", {eF2D[0], eF2D[3], eF2D[1]});
  if (params.has(layer + "shared.gate_up_F2D")) {
    moe.shared = bind_ffn(params, layer + "shared.");
    moe.shared->gate_1D = params.param(layer + "shared.gate_1D", {1, config.hidden_size});
  }
  return moe;
}

AttentionLayer bind_attention(const ModelConfig& config, const ParamStore& params, const std::string& layer) {
  AttentionLayer attention;
  attention.shape = {config.num_attention_heads, config.num_key_value_heads, config.head_dim, 0};
  attention.rope_theta = config.rope_theta;
  const std::int64_t H = attention.shape.qkv_width(), Q = config.num_attention_heads * config.head_dim;
  const std::string at = layer + "attn.";
  attention.qkv.weight_NK =
      params.joined({at + "q_NHD", at + "k_NHD", at + "v_NHD"}, {H, config.hidden_size});
  if (config.qkv_bias) attention.qkv.bias_N = params.joined({at + "q_NH", at + "k_NH", at + "v_NH"}, {H});
  attention.output.weight_NK = params.param(at + "o_DNH", {config.hidden_size, Q});
  return attention;
}

}  // namespace

Transformer make_transformer(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                             Recompute recompute) {
  const std::int64_t D = config.hidden_size, V = config.vocab_size;
  const auto eps = static_cast<float>(config.rms_norm_eps);
  Transformer model;
  model.dtype = params.dtype();
  model.embed_VD = params.param("embed_VD", {V, D});
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = fmt::format("layers.{}.", i);
    Block block;
    block.recompute = recompute;
    block.norm1 = {params.param(layer + "norm1_D", {D}), eps};
    block.norm2 = {params.param(layer + "norm2_D", {D}), eps};
    block.attention = bind_attention(config, params, layer);
    if (config.is_moe_layer(i)) {
      block.ffn = bind_moe(config, params, mesh, layer);
    } else {
      block.ffn = bind_ffn(params, layer + "ffn.");
    }
    model.blocks.push_back(std::move(block));
  }
  model.final_norm = {params.param("norm_D", {D}), eps};
  model.head.weight_VD = config.tie_word_embeddings ? model.embed_VD : params.param("head_VD", {V, D});
  return model;
}

}  // namespace upmoe

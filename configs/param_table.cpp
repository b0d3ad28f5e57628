#include "configs/param_table.h"

#include <fmt/format.h>

namespace upmoe {
namespace {

// Adds the parameters of one model in the order of the table.
class Table {
 public:
  explicit Table(const ModelConfig& config) : c_(config) {
    UPMOE_CHECK(c_.num_hidden_layers > 0 && c_.head_dim > 0, "the model config is not filled in");
  }

  std::vector<ParamSpec> make() {
    matrix("embed_VD", {c_.vocab_size, c_.hidden_size}, {Dim::kVocab, Dim::kEmbed}).tied =
        c_.tie_word_embeddings;
    for (layer_ = 0; layer_ < c_.num_hidden_layers; ++layer_) {
      norm("norm1_D");
      attention();
      norm("norm2_D");
      if (c_.is_moe_layer(layer_)) {
        mixture();
      } else {
        ffn("ffn", c_.intermediate_size);
      }
    }
    layer_ = -1;
    norm("norm_D");
    if (!c_.tie_word_embeddings) {
      matrix("head_VD", {c_.vocab_size, c_.hidden_size}, {Dim::kVocab, Dim::kEmbed});
    }
    return std::move(params_);
  }

 private:
  ParamSpec& add(const std::string& name, const Shape& shape, const std::array<Dim, 4>& dims, bool decay,
                 Init::Kind kind) {
    ParamSpec spec;
    spec.name = layer_ < 0 ? name : fmt::format("layers.{}.{}", layer_, name);
    spec.shape = shape;
    spec.dims = dims;
    spec.layer = layer_;
    spec.decay = decay;
    spec.init = {kind, static_cast<float>(c_.initializer_range)};
    return params_.emplace_back(std::move(spec));
  }
  ParamSpec& matrix(const std::string& name, const Shape& shape, const std::array<Dim, 4>& dims) {
    return add(name, shape, dims, true, Init::Kind::kNormal);
  }
  void bias(const std::string& name, const Shape& shape, const std::array<Dim, 4>& dims) {
    add(name, shape, dims, false, Init::Kind::kZeros);
  }
  void norm(const std::string& name) { add(name, {c_.hidden_size}, {Dim::kEmbed}, false, Init::Kind::kOnes); }

  void attention() {
    const std::int64_t heads = c_.num_attention_heads, kv = c_.num_key_value_heads;
    const std::array<Dim, 4> q_dims{Dim::kHeads, Dim::kHeadSize, Dim::kEmbed};
    const std::array<Dim, 4> kv_dims{Dim::kKvHeads, Dim::kHeadSize, Dim::kEmbed};
    matrix("attn.q_NHD", {heads, c_.head_dim, c_.hidden_size}, q_dims);
    matrix("attn.k_NHD", {kv, c_.head_dim, c_.hidden_size}, kv_dims);
    matrix("attn.v_NHD", {kv, c_.head_dim, c_.hidden_size}, kv_dims);
    if (c_.qkv_bias) {
      bias("attn.q_NH", {heads, c_.head_dim}, {Dim::kHeads, Dim::kHeadSize});
      bias("attn.k_NH", {kv, c_.head_dim}, {Dim::kKvHeads, Dim::kHeadSize});
      bias("attn.v_NH", {kv, c_.head_dim}, {Dim::kKvHeads, Dim::kHeadSize});
    }
    matrix("attn.o_DNH", {c_.hidden_size, heads, c_.head_dim}, {Dim::kEmbed, Dim::kHeads, Dim::kHeadSize});
  }

  // A SwiGLU: gate and up rows of a neuron are neighbours.
  void ffn(const std::string& prefix, std::int64_t width) {
    matrix(prefix + ".gate_up_F2D", {width, 2, c_.hidden_size}, {Dim::kFfn, Dim::kPair, Dim::kEmbed});
    matrix(prefix + ".down_DF", {c_.hidden_size, width}, {Dim::kEmbed, Dim::kFfn});
  }

  void mixture() {
    const std::int64_t experts = c_.num_experts, width = c_.moe_intermediate_size;
    // Every rank scores every expert, so the router's expert dim is not one that the expert axis cuts.
    matrix("moe.router_ED", {experts, c_.hidden_size}, {Dim::kOne, Dim::kEmbed});
    matrix("moe.gate_up_EF2D", {experts, width, 2, c_.hidden_size},
           {Dim::kExpert, Dim::kFfn, Dim::kPair, Dim::kEmbed})
        .expert = true;
    matrix("moe.down_EDF", {experts, c_.hidden_size, width}, {Dim::kExpert, Dim::kEmbed, Dim::kFfn}).expert =
        true;
    if (c_.shared_expert_intermediate_size == 0) return;
    matrix("shared.gate_1D", {1, c_.hidden_size}, {Dim::kOne, Dim::kEmbed});
    ffn("shared", c_.shared_expert_intermediate_size);
  }

  const ModelConfig& c_;
  int layer_ = -1;
  std::vector<ParamSpec> params_;
};

}  // namespace

std::vector<ParamSpec> make_param_table(const ModelConfig& config) {
  return Table(config).make();
}

ParamCounts count_params(const ModelConfig& config) {
  ParamCounts counts;
  for (const ParamSpec& param : make_param_table(config)) {
    const std::int64_t all = param.shape.elements();
    // Expert tensors have the expert dim first, so the share of top-k is exact.
    const std::int64_t used = param.expert ? all / param.shape[0] * config.num_experts_per_tok : all;
    const bool token_table = param.dims[0] == Dim::kVocab;  // embedding or head
    counts.total = checked_add(counts.total, all);
    counts.activated = checked_add(counts.activated, used);
    if (!token_table) counts.activated_non_embedding = checked_add(counts.activated_non_embedding, used);
  }
  return counts;
}

}  // namespace upmoe

#include "configs/families/dbrx.h"

#include <fmt/format.h>

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

// DBRX: LayerNorms without biases (their epsilon is torch's own and stands in no file), q, k and v held within a limit,
// every layer a mixture without a shared expert. What attention and experts are like stands in objects of their own in
// config.json. On disk q, k and v are one tensor, and so are all experts of a layer, their down projections transposed.
//
// The base of the rotation stands in attn_config as published. transformers 5.23 wants it there, and turns by
// rope_parameters beside it all the same, or by 10000 where there are none: what is written has it in every place.

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"d_model",     "n_heads",     "n_layers",
                                 "max_seq_len", "resid_pdrop", "emb_pdrop",
                                 "attn_config", "ffn_config",  "output_router_logits"};
constexpr double kEps = 1e-5;

constexpr const char* kQkv = "transformer.blocks.{0}.norm_attn_norm.attn.Wqkv.weight";
constexpr TensorName kTensors[] = {
    {Role::kEmbedding, Half::kWhole, "transformer.wte.weight"},
    {Role::kNorm1, Half::kWhole, "transformer.blocks.{0}.norm_attn_norm.norm_1.weight"},
    {Role::kQuery, Half::kWhole, kQkv},
    {Role::kKey, Half::kWhole, kQkv},
    {Role::kValue, Half::kWhole, kQkv},
    {Role::kAttentionOutput, Half::kWhole, "transformer.blocks.{0}.norm_attn_norm.attn.out_proj.weight"},
    {Role::kNorm2, Half::kWhole, "transformer.blocks.{0}.norm_attn_norm.norm_2.weight"},
    {Role::kRouter, Half::kWhole, "transformer.blocks.{0}.ffn.router.layer.weight"},
    {Role::kExpertGateUp, Half::kGate, "transformer.blocks.{0}.ffn.experts.mlp.w1"},
    {Role::kExpertGateUp, Half::kUp, "transformer.blocks.{0}.ffn.experts.mlp.v1"},
    {Role::kExpertDown, Half::kWhole, "transformer.blocks.{0}.ffn.experts.mlp.w2", true},
    {Role::kFinalNorm, Half::kWhole, "transformer.norm_f.weight"},
    {Role::kHead, Half::kWhole, "lm_head.weight"},
};

void require_zero(JsonObject& json, const char* key, const char* what) {
  const auto found = json.number(key, false);
  if (found && *found != 0) json.refuse(key, fmt::format("found {}; {}", *found, what));
}

void read_layers(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  f.integer("vocab_size", c.vocab_size, 1, kMaxVocab);
  f.integer("d_model", c.hidden_size, 1, kMaxWidth);
  f.integer("n_layers", c.num_hidden_layers, 1, kMaxLayers);
  f.integer("n_heads", c.num_attention_heads, 1, kMaxHeads);
  f.integer("max_seq_len", c.max_position_embeddings, 1, kMaxPositions);
  f.number("initializer_range", c.initializer_range, false, true);
  require_truth(json, "tie_word_embeddings", false, "the head of this family is not the embedding");
  for (const char* key : {"resid_pdrop", "emb_pdrop"}) require_zero(json, key, "dropout is not supported");
  if (c.num_attention_heads == 0 || c.hidden_size == 0) return;  // has been refused
  c.head_dim = c.hidden_size / c.num_attention_heads;
  if (c.hidden_size % c.num_attention_heads != 0 || c.head_dim % 2 != 0)
    json.refuse("n_heads", fmt::format("d_model = {} is not {} heads of an even width", c.hidden_size,
                                       c.num_attention_heads));
}

// Of the places in which the base may stand, those that there are must agree.
void read_base(JsonObject& json, JsonObject& attention, ModelConfig& c) {
  ConfigKeys(attention).number("rope_theta", c.rope_theta, true, false);
  if (!json.has("rope_theta") && !json.has("rope_parameters") && !json.has("rope_scaling")) return;
  const double own = c.rope_theta;
  read_rope(json, c);
  if (c.rope_theta != own)
    attention.refuse("rope_theta", fmt::format("found {}, but it is {} beside attn_config; they must agree",
                                               own, c.rope_theta));
}

void read_attention(JsonObject& json, ModelConfig& c) {
  const std::unique_ptr<JsonObject> attention = json.object("attn_config");
  if (attention == nullptr) return json.refuse("attn_config", "is missing");
  ConfigKeys f(*attention);
  f.integer("kv_n_heads", c.num_key_value_heads, 1, kMaxHeads);
  if (c.num_key_value_heads > 0 && c.num_attention_heads % c.num_key_value_heads != 0)
    attention->refuse("kv_n_heads", fmt::format("{} does not divide n_heads = {}", c.num_key_value_heads,
                                                c.num_attention_heads));
  f.number("clip_qkv", c.clip_qkv, true, false);  // transformers cannot compute without
  require_zero(*attention, "attn_pdrop", "dropout is not supported");
  read_base(json, *attention, c);
}

// Weights over the sum of their absolute values, or as they are.
void read_norm_of_weights(JsonObject& ffn, ModelConfig& c) {
  const auto p = ffn.number("moe_normalize_expert_weights", false);
  c.norm_topk_prob = !ffn.is_null("moe_normalize_expert_weights");
  if (p && *p != 1)
    ffn.refuse("moe_normalize_expert_weights",
               fmt::format("found {}; weights are divided by their sum (1), or not at all (null)", *p));
}

void read_experts(JsonObject& json, ModelConfig& c) {
  const std::unique_ptr<JsonObject> ffn = json.object("ffn_config");
  if (ffn == nullptr) return json.refuse("ffn_config", "is missing");
  ConfigKeys f(*ffn);
  f.integer("ffn_hidden_size", c.moe_intermediate_size, 1, kMaxWidth);
  f.integer("moe_num_experts", c.num_experts, 1, kMaxExperts);
  f.integer("moe_top_k", c.num_experts_per_tok, 1, kMaxExperts);
  if (c.num_experts > 0 && c.num_experts_per_tok > c.num_experts)
    ffn->refuse("moe_top_k",
                fmt::format("{} of {} experts cannot be chosen", c.num_experts_per_tok, c.num_experts));
  f.number("moe_loss_weight", c.router_aux_loss_coef, false, true);
  require_zero(*ffn, "moe_jitter_eps", "noise before the router is not supported");
  read_norm_of_weights(*ffn, c);
  const std::unique_ptr<JsonObject> act = ffn->object("ffn_act_fn");
  const std::string name = act == nullptr ? "silu" : act->text("name", false).value_or("silu");
  if (name != "silu") ffn->refuse("ffn_act_fn", fmt::format("found '{}', only silu is supported", name));
  c.intermediate_size = c.moe_intermediate_size;
}

void read(JsonObject& json, ModelConfig& c) {
  c.norm = NormKind::kLayerNorm;
  c.rms_norm_eps = kEps;
  c.qkv_bias = false;
  c.shared_expert_gate = false;
  refuse_features(json, kDbrx);
  require_full_attention(json);
  read_layers(json, c);
  read_dtype(json, c);
  read_attention(json, c);
  read_experts(json, c);
}

void write(const ModelConfig& c, JsonWriter& json) {
  UPMOE_CHECK(c.rms_norm_eps == kEps, "the norms of a dbrx have an epsilon of {}, not {}", kEps,
              c.rms_norm_eps);
  UPMOE_CHECK(c.clip_qkv > 0, "a dbrx without a limit on q, k and v");
  json.set("d_model", c.hidden_size);
  json.set("n_heads", c.num_attention_heads);
  json.set("n_layers", c.num_hidden_layers);
  json.set("max_seq_len", c.max_position_embeddings);
  json.set("vocab_size", c.vocab_size);
  json.set("initializer_range", c.initializer_range);
  json.set("resid_pdrop", 0.0);
  json.set("emb_pdrop", 0.0);
  json.set("tie_word_embeddings", false);
  JsonWriter attention, act, ffn;
  attention.set("attn_pdrop", 0.0);
  attention.set("clip_qkv", c.clip_qkv);
  attention.set("kv_n_heads", c.num_key_value_heads);
  attention.set("rope_theta", c.rope_theta);
  json.set("attn_config", attention);
  act.set("name", "silu");
  ffn.set("ffn_act_fn", act);
  ffn.set("ffn_hidden_size", c.moe_intermediate_size);
  ffn.set("hidden_size", c.hidden_size);
  ffn.set("moe_num_experts", c.num_experts);
  ffn.set("moe_top_k", c.num_experts_per_tok);
  ffn.set("moe_loss_weight", c.router_aux_loss_coef);
  ffn.set_null("moe_jitter_eps");
  if (c.norm_topk_prob) ffn.set("moe_normalize_expert_weights", 1.0);
  if (!c.norm_topk_prob) ffn.set_null("moe_normalize_expert_weights");
  json.set("ffn_config", ffn);
  if (!json.has("output_router_logits")) json.set("output_router_logits", false);
  if (!json.has("use_cache")) json.set("use_cache", true);
  json.erase("transformers_weights");  // of the directory that it was read from
  write_rope(c, json);
  write_dtype(c, json);
}

}  // namespace

const Family kDbrx{
    .model_type = "dbrx",
    .architecture = "DbrxForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .carries = Traits{Trait::kLayerNorm, Trait::kSilu, Trait::kNoBiases, Trait::kNoQkNorm, Trait::kClippedQkv,
                      Trait::kPlainEmbedding, Trait::kNoShared, Trait::kPlainWeights, Trait::kRenormalised,
                      Trait::kOneRenormalised, Trait::kSoftmaxScores}};

}  // namespace upmoe

// Our parameters under the names that transformers gives them.

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>

#include "data/hf_model.h"

namespace upmoe {

namespace {

std::vector<std::int64_t> dims_of(const Shape& s) {
  return {s.dim.begin(), s.dim.begin() + s.rank};
}

// One expert's or one matrix' gate (pair 0) or up (pair 1) half of an interleaved [.., F, 2, D].
Box half(const ParamSpec& p, std::int64_t expert, std::int64_t pair) {
  Box b = whole(p.shape);
  const int pair_dim = p.shape.rank - 2;
  b.offset.dim[static_cast<std::size_t>(pair_dim)] = pair;
  b.extent.dim[static_cast<std::size_t>(pair_dim)] = 1;
  if (p.shape.rank == 4) {
    b.offset.dim[0] = expert;
    b.extent.dim[0] = 1;
  }
  return b;
}

Box one_expert(const ParamSpec& p, std::int64_t expert) {
  Box b = whole(p.shape);
  b.offset.dim[0] = expert;
  b.extent.dim[0] = 1;
  return b;
}

void add_experts(const ParamSpec& p, const std::string& mlp, bool down, std::vector<HfTensor>& out) {
  const std::int64_t F = down ? p.shape[2] : p.shape[1], D = down ? p.shape[1] : p.shape[3];
  for (std::int64_t e = 0; e < p.shape[0]; ++e) {
    const std::string expert = fmt::format("{}experts.{}.", mlp, e);
    if (down) {
      out.push_back({expert + "down_proj.weight", {D, F}, one_expert(p, e)});
    } else {
      out.push_back({expert + "gate_proj.weight", {F, D}, half(p, e, 0)});
      out.push_back({expert + "up_proj.weight", {F, D}, half(p, e, 1)});
    }
  }
}

void add_gate_up(const ParamSpec& p, const std::string& mlp, std::vector<HfTensor>& out) {
  const std::vector<std::int64_t> shape{p.shape[0], p.shape[2]};
  out.push_back({mlp + "gate_proj.weight", shape, half(p, 0, 0)});
  out.push_back({mlp + "up_proj.weight", shape, half(p, 0, 1)});
}

// `part` is the name behind "layers.N.".
void add_layer_tensor(const ParamSpec& p, const std::string& part, std::vector<HfTensor>& out) {
  const std::string layer = fmt::format("model.layers.{}.", p.layer), mlp = layer + "mlp.",
                    shared = mlp + "shared_expert.";
  const auto plain = [&](const std::string& name, std::vector<std::int64_t> shape) {
    out.push_back({name, std::move(shape), whole(p.shape)});
  };
  const std::string attention = layer + "self_attn.";
  if (part == "norm1_D") return plain(layer + "input_layernorm.weight", dims_of(p.shape));
  if (part == "norm2_D") return plain(layer + "post_attention_layernorm.weight", dims_of(p.shape));
  for (const char* which : {"q", "k", "v"}) {
    if (part == fmt::format("attn.{}_NHD", which))
      return plain(fmt::format("{}{}_proj.weight", attention, which), {p.shape[0] * p.shape[1], p.shape[2]});
    if (part == fmt::format("attn.{}_NH", which))
      return plain(fmt::format("{}{}_proj.bias", attention, which), {p.shape.elements()});
  }
  if (part == "attn.o_DNH") return plain(attention + "o_proj.weight", {p.shape[0], p.shape[1] * p.shape[2]});
  if (part == "ffn.gate_up_F2D") return add_gate_up(p, mlp, out);
  if (part == "ffn.down_DF") return plain(mlp + "down_proj.weight", dims_of(p.shape));
  if (part == "moe.router_ED") return plain(mlp + "gate.weight", dims_of(p.shape));
  if (part == "moe.gate_up_EF2D") return add_experts(p, mlp, false, out);
  if (part == "moe.down_EDF") return add_experts(p, mlp, true, out);
  if (part == "shared.gate_1D") return plain(mlp + "shared_expert_gate.weight", dims_of(p.shape));
  if (part == "shared.gate_up_F2D") return add_gate_up(p, shared, out);
  if (part == "shared.down_DF") return plain(shared + "down_proj.weight", dims_of(p.shape));
  UPMOE_CHECK(false, "no Hugging Face name for '{}'", p.name);
}

}  // namespace

std::int64_t HfTensor::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t d : shape) n = checked_mul(n, d);
  return n;
}

std::vector<HfTensor> hf_tensors_of(const ParamSpec& p) {
  std::vector<HfTensor> out;
  if (p.layer >= 0) {
    const std::string prefix = fmt::format("layers.{}.", p.layer);
    UPMOE_CHECK(p.name.starts_with(prefix), "parameter '{}' of layer {}", p.name, p.layer);
    add_layer_tensor(p, p.name.substr(prefix.size()), out);
  } else if (p.name == "embed_VD") {
    out.push_back({"model.embed_tokens.weight", dims_of(p.shape), whole(p.shape)});
  } else if (p.name == "norm_D") {
    out.push_back({"model.norm.weight", dims_of(p.shape), whole(p.shape)});
  } else {
    UPMOE_CHECK(p.name == "head_VD", "no Hugging Face name for '{}'", p.name);
    out.push_back({"lm_head.weight", dims_of(p.shape), whole(p.shape)});
  }
  return out;
}

namespace {

// Where a parameter's tensors stand in a block of transformers' state dict. Gate, up and down of one expert
// are neighbours there, so the experts' two parameters share one place.
std::size_t place_in_block(std::string_view part) {
  constexpr std::array<std::string_view, 16> kOrder{
      "attn.q_NHD",       "attn.q_NH",       "attn.k_NHD",  "attn.k_NH",
      "attn.v_NHD",       "attn.v_NH",       "attn.o_DNH",  "moe.router_ED",
      "moe.gate_up_EF2D", "ffn.gate_up_F2D", "ffn.down_DF", "shared.gate_up_F2D",
      "shared.down_DF",   "shared.gate_1D",  "norm1_D",     "norm2_D"};
  if (part == "moe.down_EDF") part = "moe.gate_up_EF2D";
  const auto* const it = std::find(kOrder.begin(), kOrder.end(), part);
  UPMOE_CHECK(it != kOrder.end(), "no place for '{}'", part);
  return static_cast<std::size_t>(it - kOrder.begin());
}

// transformers makes the modules of a shared expert whatever its width.
std::vector<HfTensor> empty_shared_expert(const ModelConfig& config, int layer) {
  const std::string mlp = fmt::format("model.layers.{}.mlp.", layer), shared = mlp + "shared_expert.";
  const std::int64_t D = config.hidden_size;
  return {{shared + "gate_proj.weight", {0, D}, {}, true},
          {shared + "up_proj.weight", {0, D}, {}, true},
          {shared + "down_proj.weight", {D, 0}, {}, true},
          {mlp + "shared_expert_gate.weight", {1, D}, {}, true}};
}

struct Placed {
  std::tuple<int, std::size_t, std::int64_t> place;  // block, place in it, expert
  HfTensor tensor;
};

void add_empty_shared_experts(const ModelConfig& config, std::vector<Placed>& placed) {
  if (config.shared_expert_intermediate_size > 0) return;
  const std::size_t first = place_in_block("shared.gate_up_F2D");
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    for (HfTensor& t : empty_shared_expert(config, layer))
      placed.push_back({{layer, first, 0}, std::move(t)});
  }
}

}  // namespace

std::vector<HfTensor> hf_tensors_of(const ModelConfig& config) {
  std::vector<Placed> placed;
  for (const ParamSpec& p : make_param_table(config)) {
    const bool in_block = p.layer >= 0;
    const int block = in_block ? p.layer : p.name == "embed_VD" ? -1 : config.num_hidden_layers;
    const std::size_t place =
        in_block ? place_in_block(std::string_view(p.name).substr(p.name.find('.', 7) + 1)) : 0;
    for (HfTensor& t : hf_tensors_of(p))
      placed.push_back({{block, place, p.expert ? t.part.offset[0] : 0}, std::move(t)});
  }
  add_empty_shared_experts(config, placed);
  std::stable_sort(placed.begin(), placed.end(),
                   [](const Placed& a, const Placed& b) { return a.place < b.place; });
  std::vector<HfTensor> all;
  for (Placed& p : placed) all.push_back(std::move(p.tensor));
  return all;
}

}  // namespace upmoe

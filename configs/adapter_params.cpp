#include "configs/adapter_params.h"

#include <fmt/format.h>

#include <array>
#include <cmath>

namespace upmoe {
namespace {

struct AdaptedModule {
  LoraTarget target;
  AdaptedPart part;
  const char *name, *a, *b;
};

const auto& modules() {
  using enum LoraTarget;
  static constexpr auto kModules = std::to_array<AdaptedModule>({
      {kQuery, {Role::kQuery, Half::kWhole}, "attn.q", "lora_A_LD", "lora_B_NHL"},
      {kKey, {Role::kKey, Half::kWhole}, "attn.k", "lora_A_LD", "lora_B_NHL"},
      {kValue, {Role::kValue, Half::kWhole}, "attn.v", "lora_A_LD", "lora_B_NHL"},
      {kOutput, {Role::kAttentionOutput, Half::kWhole}, "attn.o", "lora_A_LNH", "lora_B_DL"},
      {kGate, {Role::kFfnGateUp, Half::kGate}, "ffn.gate", "lora_A_LD", "lora_B_FL"},
      {kUp, {Role::kFfnGateUp, Half::kUp}, "ffn.up", "lora_A_LD", "lora_B_FL"},
      {kDown, {Role::kFfnDown, Half::kWhole}, "ffn.down", "lora_A_LF", "lora_B_DL"},
      {kGate, {Role::kExpertGateUp, Half::kGate}, "moe.gate", "lora_A_ELD", "lora_B_EFL"},
      {kUp, {Role::kExpertGateUp, Half::kUp}, "moe.up", "lora_A_ELD", "lora_B_EFL"},
      {kDown, {Role::kExpertDown, Half::kWhole}, "moe.down", "lora_A_ELF", "lora_B_EDL"},
      {kGate, {Role::kSharedGateUp, Half::kGate}, "shared.gate", "lora_A_LD", "lora_B_FL"},
      {kUp, {Role::kSharedGateUp, Half::kUp}, "shared.up", "lora_A_LD", "lora_B_FL"},
      {kDown, {Role::kSharedDown, Half::kWhole}, "shared.down", "lora_A_LF", "lora_B_DL"},
  });
  return kModules;
}

// Dims with their sizes, as a shape is put together.
struct Dims {
  Shape shape;
  std::array<Dim, 4> dims{};
  void add(Dim dim, std::int64_t size) {
    const auto at = static_cast<std::size_t>(shape.rank++);
    shape.dim[at] = size;
    dims[at] = dim;
  }
  void add(const ParamSpec& p, int d) { add(p.dims[static_cast<std::size_t>(d)], p.shape[d]); }
};

// a and b of one half of a weight: [E] L K.. and [E] N.. L, without the dim of halves.
void shape_factors(const ParamSpec& weight, std::int64_t rank, Dims& a, Dims& b) {
  const int inputs = first_input_dim(weight);
  int d = 0;
  if (weight.expert) {
    a.add(weight, 0);
    b.add(weight, 0);
    d = 1;
  }
  a.add(Dim::kOne, rank);
  for (; d < weight.shape.rank; ++d)
    if (weight.dims[static_cast<std::size_t>(d)] != Dim::kPair) (d < inputs ? b : a).add(weight, d);
  b.add(Dim::kOne, rank);
}

ParamSpec factor_of(const ParamSpec& weight, const AdaptedPart& part, AdapterFactor factor,
                    const Dims& form) {
  ParamSpec spec;
  const bool is_a = factor == AdapterFactor::kA;
  spec.name = adapter_name(part, factor, weight.layer);
  spec.role = is_a ? Role::kAdapterA : Role::kAdapterB;
  spec.adapts = Adapts{part, factor};
  spec.shape = form.shape;
  spec.dims = form.dims;
  spec.layer = weight.layer;
  spec.expert = weight.expert;
  // Without a dim of experts, and of the a's rank: what one of its rows has.
  const std::int64_t inputs =
      form.shape.elements() / (weight.expert ? form.shape[0] : 1) / form.shape[weight.expert ? 1 : 0];
  if (is_a) {
    spec.init = {Init::Kind::kUniform, static_cast<float>(1.0 / std::sqrt(static_cast<double>(inputs)))};
  } else {
    spec.init = {Init::Kind::kZeros};
  }
  spec.added = true;
  return spec;
}

}  // namespace

std::vector<AdaptedPart> parts_of(LoraTarget target) {
  std::vector<AdaptedPart> parts;
  for (const AdaptedModule& m : modules())
    if (m.target == target) parts.push_back(m.part);
  return parts;
}

std::string adapter_name(const AdaptedPart& part, AdapterFactor factor, int layer) {
  for (const AdaptedModule& m : modules())
    if (m.part == part)
      return fmt::format("layers.{}.{}.{}", layer, m.name, factor == AdapterFactor::kA ? m.a : m.b);
  fail(ExitCode::kFailure, "{} has no adapter", name_of(part.role));
}

std::vector<ParamSpec> adapter_params(const ModelConfig& config, Role role, int layer) {
  std::vector<ParamSpec> params;
  if (!config.lora.given()) return params;
  for (const AdaptedModule& m : modules()) {
    if (m.part.role != role || !config.lora.has(m.target)) continue;
    const ParamSpec weight = make_param(config, role, layer);
    Dims a, b;
    shape_factors(weight, config.lora.rank, a, b);
    params.push_back(factor_of(weight, m.part, AdapterFactor::kA, a));
    params.push_back(factor_of(weight, m.part, AdapterFactor::kB, b));
  }
  return params;
}

}  // namespace upmoe

#include "upcycle/growth.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "data/hf_model.h"

namespace upmoe {
namespace {

bool experts_share_a_tensor(const ModelConfig& source) {
  return std::ranges::any_of(family_of(source).tensors, [](const TensorName& name) {
    return (name.role == Role::kExpertGateUp || name.role == Role::kExpertDown) && !name.by_expert();
  });
}

// Tensors of the source by what they hold.
class SourceNames {
 public:
  explicit SourceNames(const ModelConfig& source) {
    for (const ParamSpec& p : make_param_table(source))
      for (const HfTensor& t : hf_tensors_of(source, p))
        names_.emplace(std::tuple(p.role, p.layer, t.half, t.expert), t.name);
  }
  const std::string& of(const ParamSpec& p, Half half, std::int64_t expert) const {
    const auto found = names_.find({p.role, p.layer, half, expert});
    UPMOE_CHECK(found != names_.end(), "the mixture has no tensor for {}", p.name);
    return found->second;
  }

 private:
  std::map<std::tuple<Role, int, Half, std::int64_t>, std::string> names_;
};

ModelConfig with_copies(const ModelConfig& source, int copies) {
  ModelConfig grown = source;
  grown.num_experts *= copies;
  return grown;
}

Recipe growth_of(const ModelConfig& source, int copies, double noise) {
  const SourceNames names(source);
  const ModelConfig grown = with_copies(source, copies);
  Recipe recipe;
  recipe.copies_of_experts = copies;
  recipe.layers.resize(static_cast<std::size_t>(source.num_hidden_layers));
  for (int layer = 0; layer < source.num_hidden_layers; ++layer)
    if (source.is_moe_layer(layer))
      recipe.layers[static_cast<std::size_t>(layer)].experts.resize(
          static_cast<std::size_t>(grown.num_experts));
  for (const ParamSpec& param : make_param_table(grown)) {
    if (!param.trained) continue;  // a buffer begins at zero
    for (const HfTensor& t : hf_tensors_of(grown, param)) {
      const int line = static_cast<int>(recipe.lines.size());
      const std::int64_t expert = t.expert < 0 ? t.expert : t.expert % source.num_experts;
      const std::string& from = names.of(param, t.half, expert);
      Transform made = Copy{from};
      if (param.role == Role::kRouter) made = RepeatedRows{from, source.num_experts, noise};
      recipe.lines.push_back({t.name, t.shape, std::move(made)});
      if (param.layer < 0) continue;
      Recipe::Layer& index = recipe.layers[static_cast<std::size_t>(param.layer)];
      const auto matrix = static_cast<std::size_t>(matrix_of(t.half));
      if (param.role == Role::kRouter) index.router = line;
      if (param.role == Role::kSharedGate) index.shared_gate = line;
      if (param.expert) index.experts[static_cast<std::size_t>(t.expert)][matrix] = line;
      if (param.role == Role::kSharedGateUp || param.role == Role::kSharedDown) index.shared[matrix] = line;
    }
  }
  return recipe;
}

}  // namespace

std::vector<std::string> growth_problems(const UpcycleConfig& config, const ModelConfig& source) {
  std::vector<std::string> problems;
  const auto& t = config.target;
  const auto expect = [&](const char* key, std::int64_t found, std::int64_t expected, const char* why) {
    if (found != expected)
      problems.push_back(fmt::format("target.{}: {}, expected {} ({})", key, found, expected, why));
  };
  expect("num_experts", t.num_experts, std::int64_t{source.num_experts} * config.grow.copies,
         "grow.copies times the source's");
  expect("moe_intermediate_size", t.moe_intermediate_size, source.moe_intermediate_size, "the source's");
  expect("shared_expert_intermediate_size", t.shared_expert_intermediate_size,
         source.shared_expert_intermediate_size, "the source's");
  if (t.norm_topk_prob != source.norm_topk_prob)
    problems.push_back(fmt::format("target.norm_topk_prob: {}, expected {} (the source's)", t.norm_topk_prob,
                                   source.norm_topk_prob));
  if (t.num_experts_per_tok < 1 || t.num_experts_per_tok > t.num_experts)
    problems.push_back(
        fmt::format("target.num_experts_per_tok: {} of {} experts", t.num_experts_per_tok, t.num_experts));
  if (source.router_bias)
    problems.push_back(
        "the source's routers have biases beside them, which are not copied: it would choose others");
  if (source.router.groups > 1)
    problems.push_back(fmt::format("the source's experts lie in {} groups, which copies would not stay in",
                                   source.router.groups));
  if (source.router.score == RouterScore::kSigmoid && !source.norm_topk_prob)
    problems.push_back(
        "the source's weights are sigmoids that are not renormalised: copies would add up to more");
  if (experts_share_a_tensor(source))
    problems.push_back(
        fmt::format("{} has all experts in one tensor, which is not taken apart", source.model_type));
  return problems;
}

ModelConfig grown_config(const UpcycleConfig& config, const ModelConfig& source) {
  ModelConfig grown = with_copies(source, config.grow.copies);
  grown.num_experts_per_tok = config.target.num_experts_per_tok;
  return grown;
}

Recipe make_growth(const UpcycleConfig& config, const ModelConfig& source) {
  const std::vector<std::string> problems = growth_problems(config, source);
  if (!problems.empty())
    fail(ExitCode::kUsage, "{}: this recipe does not fit the mixture:{}", config.origin, listed(problems));
  Recipe recipe = growth_of(source, config.grow.copies, config.grow.noise);
  recipe.seed = static_cast<std::uint64_t>(config.seed);
  return recipe;
}

Recipe copy_of_mixture(const ModelConfig& source) {
  return growth_of(source, 1, 0.0);
}

}  // namespace upmoe

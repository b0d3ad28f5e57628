#include "upcycle/recipe_problems.h"

#include <cmath>
#include <limits>

#include "kernels/core/tensor.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/scale.h"

namespace upmoe {
namespace {

class Misfits {
 public:
  template <class... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) {
    list_.push_back(fmt::format(format, std::forward<Args>(args)...));
  }
  std::vector<std::string> take() { return std::move(list_); }

 private:
  std::vector<std::string> list_;
};

void check_values(const UpcycleConfig& c, Misfits& problems) {
  if (!(c.experts.reinit >= 0 && c.experts.reinit <= 1)) {
    problems.add("experts.reinit: {} is not a share between 0 and 1", c.experts.reinit);
  }
  if (!(c.experts.noise >= 0 && std::isfinite(c.experts.noise))) {
    problems.add("experts.noise: {} is not a standard deviation", c.experts.noise);
  }
  if (!(c.experts.noise_share >= 0 && c.experts.noise_share <= 1)) {
    problems.add("experts.noise_share: {} is not a share between 0 and 1", c.experts.noise_share);
  }
  if (!(c.router.std >= 0 && std::isfinite(c.router.std))) {
    problems.add("router.std: {} is not a standard deviation", c.router.std);
  }
  if (c.experts.scale && !std::isfinite(*c.experts.scale))
    problems.add("experts.scale: {} is not finite", *c.experts.scale);
  if (c.shared.scale && !std::isfinite(*c.shared.scale))
    problems.add("shared.scale: {} is not finite", *c.shared.scale);
}

// False when the rest cannot be judged.
bool check_target(const UpcycleConfig& c, Misfits& problems) {
  const auto& t = c.target;
  if (t.num_experts < 1) problems.add("target.num_experts: {}, expected at least 1", t.num_experts);
  if (t.num_experts_per_tok < 1 || t.num_experts_per_tok > t.num_experts) {
    problems.add("target.num_experts_per_tok: {}, expected 1 to {} (num_experts)", t.num_experts_per_tok,
                 t.num_experts);
  }
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const auto width_ok = [&](const char* key, std::int64_t width, std::int64_t least) {
    if (width < least || width > kMax)
      problems.add("target.{}: {}, expected {} to {}", key, width, least, kMax);
    return width >= least && width <= kMax;
  };
  const bool routed = width_ok("moe_intermediate_size", t.moe_intermediate_size, 1);
  const bool shared = width_ok("shared_expert_intermediate_size", t.shared_expert_intermediate_size, 0);
  return routed && shared && t.num_experts >= 1;
}

// How many copies of the dense FFN the experts take. Of 8 dense neurons, 4 experts of 3 neurons each:
//
//   virtual_group    012 345 67- 012 ...   3 shards a copy, the last padded: 4 is no multiple; 6 would be 2 copies
//   split, shuffle   012 345 670 123 4     12 neurons out of a row of copies: 2, the second not used up
//   copy             width 8 alone         a copy each: 4
void check_copies(const UpcycleConfig& c, std::int64_t dense_width, int sources, Misfits& problems) {
  const auto& t = c.target;
  const int experts = t.num_experts / sources;  // of one dense model
  const ExpertMethod method = c.experts.method;
  const std::int64_t shards = shards_per_copy(dense_width, t.moe_intermediate_size);
  if (method == ExpertMethod::kCopy && t.moe_intermediate_size != dense_width) {
    problems.add(
        "experts.method copy needs target.moe_intermediate_size = {} (the dense width), found {}; to cut "
        "experts out of copies use split, shuffle or virtual_group",
        dense_width, t.moe_intermediate_size);
  }
  if (method == ExpertMethod::kVirtualGroup && experts % shards != 0) {
    problems.add(
        "experts.method virtual_group: one copy of the dense FFN makes {} shards of {} neurons; "
        "the {} experts of a dense model are no multiple of that",
        shards, t.moe_intermediate_size, experts);
  }
  if (!c.experts.copies) return;
  const std::int64_t given = *c.experts.copies;
  if (method == ExpertMethod::kSplit || method == ExpertMethod::kShuffle) {
    const bool pooled = method == ExpertMethod::kShuffle && c.shared.method == SharedMethod::kShuffle;
    const std::int64_t neurons = checked_add(checked_mul(experts, t.moe_intermediate_size),
                                             pooled ? t.shared_expert_intermediate_size : 0);
    const std::int64_t needed = shards_per_copy(neurons, dense_width);
    if (given < needed) {
      problems.add(
          "experts.copies: {} copies of {} neurons are fewer than the {} that the experts take; give at "
          "least {} or auto",
          given, dense_width, neurons, needed);
    }
    return;
  }
  const std::int64_t expected = method == ExpertMethod::kCluster        ? 1
                                : method == ExpertMethod::kCopy         ? experts
                                : method == ExpertMethod::kVirtualGroup ? experts / shards
                                                                        : 0;
  if (given != expected) {
    problems.add("experts.copies: {}, but experts.method {} makes {}; write auto", given, name_of(method),
                 expected);
  }
}

// Neurons that tokens put in order: each is of the shared expert or of one routed expert.
void check_clusters(const UpcycleConfig& c, std::int64_t dense_width, int sources, Misfits& problems) {
  const auto& t = c.target;
  const bool clusters = c.experts.method == ExpertMethod::kCluster,
             active = c.shared.method == SharedMethod::kActive;
  if (!clusters) {
    if (active) problems.add("shared.method active needs experts.method cluster");
    if (c.router.method == RouterMethod::kNeurons)
      problems.add("router.method neurons needs experts.method cluster");
    return;
  }
  if (sources > 1) problems.add("experts.method cluster divides one dense model, found {}", sources);
  const std::int64_t shared = active ? t.shared_expert_intermediate_size : 0,
                     routed = checked_mul(t.num_experts, t.moe_intermediate_size);
  if (shared + routed != dense_width)
    problems.add(
        "experts.method cluster divides the {} neurons of the dense FFN: {} of the shared expert "
        "(shared.method {}) "
        "and {} x {} are {}",
        dense_width, shared, name_of(c.shared.method), t.num_experts, t.moe_intermediate_size,
        shared + routed);
  if (c.experts.cluster_markers > dense_width)
    problems.add("experts.cluster_markers: {} of {} neurons", c.experts.cluster_markers, dense_width);
}

void check_shared(const UpcycleConfig& c, std::int64_t dense_width, Misfits& problems) {
  const std::int64_t width = c.target.shared_expert_intermediate_size;
  if (width > 0 && c.shared.method == SharedMethod::kNone) {
    problems.add("shared.method none contradicts target.shared_expert_intermediate_size = {}; make it 0",
                 width);
  }
  if (width > 0 && c.shared.method == SharedMethod::kDense && width < dense_width) {
    problems.add(
        "shared.method dense needs target.shared_expert_intermediate_size >= {} (the dense width), found {}",
        dense_width, width);
  }
}

}  // namespace

std::vector<std::string> problems_of(const UpcycleConfig& config, const ModelConfig& dense, int sources) {
  Misfits problems;
  if (dense.num_experts > 0) {
    problems.add("the source is a mixture of {} experts already; a dense model is needed", dense.num_experts);
  }
  if (dense.intermediate_size < 1 || dense.intermediate_size > std::numeric_limits<std::int32_t>::max()) {
    problems.add("the source's intermediate_size is {}", dense.intermediate_size);
  }
  check_values(config, problems);
  const bool sizes_ok = check_target(config, problems);
  if (!sizes_ok || dense.intermediate_size < 1) return problems.take();
  if (config.target.num_experts % sources != 0) {
    problems.add("{} dense models do not make {} experts (target.num_experts) in equal parts", sources,
                 config.target.num_experts);
    return problems.take();
  }
  check_copies(config, dense.intermediate_size, sources, problems);
  check_clusters(config, dense.intermediate_size, sources, problems);
  check_shared(config, dense.intermediate_size, problems);
  const std::string layers = problem_of(config.target.layers, dense.num_hidden_layers);
  if (!layers.empty()) problems.add("target.layers: {}", layers);
  const MixtureChoice choice = choose_mixture(family_of(dense), wanted_mixture(config, dense));
  if (layers.empty() && choice.family == nullptr) problems.add("{}", choice.problem);
  const std::int64_t shards = shards_per_copy(dense.intermediate_size, config.target.moe_intermediate_size);
  if (config.router.method == RouterMethod::kVirtualGroup && config.target.num_experts % shards != 0) {
    problems.add("router.method virtual_group: groups of {} shards do not divide target.num_experts = {}",
                 shards, config.target.num_experts);
  }
  return problems.take();
}

}  // namespace upmoe

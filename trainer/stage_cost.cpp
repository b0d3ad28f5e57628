#include "trainer/stage_cost.h"

#include "trainer/dry_model.h"

namespace upmoe {

StagePlan stages_of(const RunConfig& run, const ModelConfig& model) {
  const int stages = run.parallel.pp, chunks = run.parallel.pp_chunks;
  if (stages * chunks == 1) return one_stage(model.num_hidden_layers);
  std::vector<double> costs(static_cast<std::size_t>(model.num_hidden_layers));
  DryModel dry(run, model, {});
  double dense = -1, mixture = -1;  // blocks of a kind are alike
  for (int i = 0; i < model.num_hidden_layers; ++i) {
    double& kind = model.is_moe_layer(i) ? mixture : dense;
    if (kind < 0) kind = dry.block(static_cast<std::size_t>(i));
    costs[static_cast<std::size_t>(i)] = kind;
  }
  return plan_stages(stages, chunks, costs, 0, dry.head());  // the embedding is a copy: no product
}

}  // namespace upmoe

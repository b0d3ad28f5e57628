#pragma once
// What a run that is not possible could be instead.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

// Up to `most` meshes of world_size ranks that this run and model allow, those nearest to the run's first (an
// axis doubled or halved is one step); empty when no mesh near it helps. Of ep's ranks every one has an expert in them.
std::vector<std::string> nearest_meshes(const RunConfig& run, const ModelConfig& model, int world_size,
                                        std::size_t most = 3);
// Every mesh of `world` ranks whose axes are among `of(n, axis)`: divisors of n, what the axes before it leave of the
// ranks. ep and etp divide a stage's ranks; pp, cp and tp all of them; what remains is dp.
template <class Of, class Visit>
void for_each_mesh(int world, const Of& of, const Visit& visit) {
  for (const int pp : of(world, &RunConfig::Parallel::pp))
    for (const int cp : of(world / pp, &RunConfig::Parallel::cp))
      for (const int tp : of(world / pp / cp, &RunConfig::Parallel::tp))
        for (const int ep : of(world / pp, &RunConfig::Parallel::ep))
          for (const int etp : of(world / pp / ep, &RunConfig::Parallel::etp))
            visit(RunConfig::Parallel{.tp = tp, .pp = pp, .cp = cp, .ep = ep, .etp = etp});
}

// Throws Error(kUsage) with everything that makes the run impossible for so many ranks, and the nearest meshes that
// are possible.
void require_possible(const RunConfig& run, const ModelConfig& model, int world_size);

}  // namespace upmoe

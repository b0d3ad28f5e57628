// How often the host waits for its (pretended) GPU in a step: for the sums of all micro-batches and for the norm of the
// gradients; besides, where the host has to know how many rows come, for the counts of each mixture and micro-batch.

#include <gtest/gtest.h>

#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/layout_run.h"

namespace upmoe::test {
namespace {

struct Case {
  std::string name;
  Layout layout;
  int of_each_mixture = 0;  // waits for counts, in each micro-batch
};

struct Waits {
  int all = 0;       // of a run
  int mixtures = 0;  // of this rank, times micro-batches
};

std::vector<Waits> waits_of(Layout layout, std::int64_t steps) {
  layout.steps = steps;
  const Golden golden(layout.model);
  std::vector<Waits> waits(static_cast<std::size_t>(layout.mesh.world()));
  Outcome outcome;
  std::mutex mutex;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    Waits& mine = waits[static_cast<std::size_t>(world.rank())];
    const int before = fake_cuda::host_waits();
    run_rank(world, golden, layout, outcome, mutex, {}, [&](Session& s) {
      for (const Transformer& chunk : s.chunks)
        for (const Block& block : chunk.blocks)
          if (block.is_moe()) mine.mixtures += static_cast<int>(s.batches->rounds());
    });
    mine.all = fake_cuda::host_waits() - before;
  });
  return waits;
}

Layout layout_of(const char* model, MeshSpec mesh = {}) {
  return {model, mesh, 1};
}
Layout fused(MeshSpec mesh = {}) {
  Layout layout = layout_of("moe_a27b", mesh);
  layout.width = 256;
  layout.precision = layout.reduce = Precision::kBf16;
  layout.experts = ExpertsPath::kFused;
  return layout;
}
Layout by_nodes() {
  Layout layout = layout_of("moe_a27b", {1, 4, 1, 1, 4, 1});
  layout.node_ranks = 2;
  return layout;
}
Layout balanced_in_every_way() {
  Layout layout = fused();
  layout.aux_kinds = {AuxKind::kHf, AuxKind::kSequence, AuxKind::kGlobal};
  layout.bias_rate = 0.01;
  layout.z_loss = 0.1;
  layout.with_form().score = RouterScore::kSigmoid;
  return layout;
}
// What is weighed, drawn, dropped and chosen by experts is counted on the device, too.
Layout noisy() {
  Layout layout = fused();
  layout.aux_kinds = {AuxKind::kImportance, AuxKind::kLoad};
  layout.with_form().kind = RouterKind::kNoisy;
  return layout;
}
Layout within_capacity() {
  Layout layout = fused();
  layout.with_form().capacity_factor = 1.25;
  return layout;
}
Layout again() {
  Layout layout = layout_of("moe_a27b", {1, 2, 1, 1, 2, 1});
  layout.recompute = Recompute::kFfn;
  return layout;
}

std::vector<Case> cases() {
  return {{"dense", layout_of("dense_tied_gqa"), 0},
          {"dense_tp", layout_of("dense_tied_gqa", {1, 1, 1, 2, 1, 1}), 0},
          {"mixture", fused(), 0},
          {"mixture_with_all_terms", balanced_in_every_way(), 0},
          {"mixture_with_noise", noisy(), 0},
          {"mixture_dp", fused({1, 2, 1, 1, 1, 1}), 0},
          {"mixture_pp", fused({2, 1, 1, 1, 1, 1}), 0},
          // A product for each expert takes its rows as numbers of the host.
          {"mixture_streams", layout_of("moe_a27b"), 1},
          // What an expert has no room for goes nowhere.
          {"mixture_within_capacity", within_capacity(), 1},
          // Of how many rows come from each rank. By nodes it is known twice: across them, and inside.
          {"mixture_ep", fused({1, 2, 1, 1, 2, 1}), 1},
          {"mixture_ep_streams", layout_of("moe_a27b", {1, 2, 1, 1, 2, 1}), 1},
          {"mixture_etp", layout_of("moe_a27b", {1, 2, 1, 1, 1, 2}), 1},
          {"mixture_nodes", by_nodes(), 2},
          // Backward routes its rows once more.
          {"mixture_ep_again", again(), 2}};
}

class HostWaits : public testing::TestWithParam<Case> {};

TEST_P(HostWaits, TwoInAStepAndThoseForCounts) {
  const Case& c = GetParam();
  const std::vector<Waits> one = waits_of(c.layout, 1), two = waits_of(c.layout, 2);
  for (std::size_t rank = 0; rank < one.size(); ++rank)
    EXPECT_EQ(two[rank].all - one[rank].all, 2 + c.of_each_mixture * two[rank].mixtures) << "rank " << rank;
}

INSTANTIATE_TEST_SUITE_P(Layouts, HostWaits, testing::ValuesIn(cases()),
                         [](const auto& i) { return i.param.name; });

}  // namespace
}  // namespace upmoe::test

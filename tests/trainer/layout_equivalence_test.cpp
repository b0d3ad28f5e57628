// Any mesh computes what one rank computes: loss, balance terms, every gradient, clip norm and five optimizer
// steps. Runs as threads here; under mpirun (layout_test_mpiN) the world is MPI's and must give the threads'
// results to the bit. UPMOE_LAYOUTS=all runs every mesh of up to 8 ranks instead of a sample.

#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/core/philox.h"
#include "parallel/runtime.h"
#include "tests/support/layout_outcomes.h"
#include "tests/support/tolerance.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Golden;
using test::Layout;
using test::Limits;
using test::one_rank;
using test::Outcome;
using test::relative_distance;
using test::run_in_layout;
using test::Tensors;

// On GPUs, often pretended and slow: each axis, and all of them.
std::vector<Layout> gpu_meshes() {
  std::vector<Layout> all;
  for (const MeshSpec& mesh :
       {MeshSpec{1, 2, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 1, 1, 2, 1, 2},
        MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{2, 1, 1, 1, 1, 1}, MeshSpec{2, 1, 2, 2, 4, 1}})
    if (mesh.world() <= gpu::count()) all.push_back({"moe_mixed", mesh});
  if (gpu::count() >= 4) {
    all.push_back({"moe_mixed", {2, 2, 1, 1, 2, 1}, 1, 2});
    all.push_back({"moe_mixed", {1, 4, 1, 1, 4, 1}});
    all.back().node_ranks = 2;
    all.push_back({"moe_odd", {1, 4, 1, 1, 2, 1}});
    all.back().zero = 2;
    all.push_back(test::of_three_experts({1, 4, 1, 1, 4, 1}));
    all.push_back(test::of_three_experts({1, 2, 1, 2, 4, 1}));
    all.back().node_ranks = 1;  // the first node has none
    all.push_back(test::of_three_experts({1, 1, 2, 2, 4, 1}));
    all.back().zero = 2;
    all.back().lora = {3, 6, {LoraTarget::kGate, LoraTarget::kUp, LoraTarget::kDown}};
  }
  if (gpu::count() >= 2) {
    all.push_back({"qwen3", {1, 1, 1, 2, 1, 1}});
    all.push_back({"moe_a27b", {1, 1, 1, 2, 1, 2}});
    all.back().lora = {3, 6, {LoraTarget::kQuery, LoraTarget::kValue, LoraTarget::kUp, LoraTarget::kDown}};
    all.push_back({"mistral", {1, 1, 2, 1, 1, 1}});
    all.push_back({"gemma", {2, 1, 1, 1, 1, 1}});
  }
  for (Layout& l : all) l.steps = 2;
  return all;
}

std::vector<Layout> chosen_meshes() {
  if (test::on_gpu()) return gpu_meshes();
  const char* mode = std::getenv("UPMOE_LAYOUTS");
  const bool every = mode != nullptr && std::string(mode) == "all";
  std::vector<Layout> all;
  for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_odd", "moe_mixed"})
    for (int ranks = 2; ranks <= 8; ++ranks)
      for (const Layout& l : test::meshes(model, ranks)) all.push_back(l);
  if (every) return all;
  std::vector<Layout> sample;  // a fixed one, the same on every machine
  for (std::size_t i = 0; i < all.size(); ++i)
    if (philox(20, i)[0] % all.size() < 90) sample.push_back(all[i]);
  return sample;
}

class Meshes : public testing::TestWithParam<Layout> {};

TEST_P(Meshes, EqualsOneRank) {
  expect_equal(one_rank(GetParam()), run_in_layout(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Threads, Meshes, testing::ValuesIn(chosen_meshes()),
                         [](const auto& l) { return l.param.str(); });

// What else a step may contain, each under a few meshes that use every axis.
std::vector<MeshSpec> all_axes() {
  return {{2, 1, 2, 2, 4, 1}, {1, 2, 1, 2, 2, 2}, {2, 2, 1, 1, 2, 1}, {1, 1, 2, 2, 1, 4}};
}

TEST(Features, DocumentMasks) {
  for (const MeshSpec& mesh : all_axes()) {
    Layout l{"moe_mixed", mesh, 2};
    l.mask_documents = true;
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

TEST(Features, ExchangeByNodes) {
  for (const auto& [mesh, node_ranks] : {std::pair{MeshSpec{1, 4, 1, 1, 4, 1}, 2},
                                         {MeshSpec{2, 2, 1, 2, 4, 1}, 2},
                                         {MeshSpec{1, 2, 1, 2, 4, 1}, 4},
                                         {MeshSpec{1, 4, 1, 2, 8, 1}, 4}}) {
    Layout l{"moe_mixed", mesh, 1};
    l.node_ranks = node_ranks;
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

// More ranks along ep than experts: some hold none, alone, beside every other axis, and whole nodes of them.
TEST(Features, RanksWithoutExperts) {
  for (const auto& [mesh, node_ranks] : {std::pair{MeshSpec{1, 4, 1, 1, 4, 1}, 0},
                                         {MeshSpec{1, 2, 1, 2, 4, 1}, 0},
                                         {MeshSpec{1, 1, 2, 2, 4, 1}, 0},
                                         {MeshSpec{2, 2, 1, 2, 4, 1}, 0},
                                         {MeshSpec{1, 4, 1, 2, 4, 2}, 0},
                                         {MeshSpec{1, 4, 1, 2, 4, 1}, 0},
                                         {MeshSpec{1, 4, 1, 1, 4, 1}, 1},
                                         {MeshSpec{1, 4, 1, 1, 4, 1}, 2},
                                         {MeshSpec{1, 4, 1, 2, 8, 1}, 2}})
    for (const int zero : {1, 2})
      for (const Recompute recompute : {Recompute::kNone, Recompute::kRoutedUp, Recompute::kBlock}) {
        Layout l = test::of_three_experts(mesh);
        l.node_ranks = node_ranks;
        l.zero = zero;
        l.recompute = recompute;
        SCOPED_TRACE(
            fmt::format("{}, nodes of {}, zero {}, {}", l.str(), node_ranks, zero, name_of(recompute)));
        expect_equal(one_rank(l), run_in_layout(l));
      }
}

// Blocks that share their gradients' memory: uneven shares, replicated key/value heads, interleaved stages,
// several micro-batches on each rank.
TEST(Features, SharedBlockGradients) {
  for (Layout l : {Layout{"dense_tied_gqa", {1, 1, 1, 6, 1, 1}}, Layout{"dense_tied_gqa", {2, 2, 1, 2, 1, 1}},
                   Layout{"moe_a27b", {1, 2, 1, 1, 2, 1}}, Layout{"moe_mixed", {1, 2, 1, 2, 2, 2}},
                   Layout{"moe_mixed", {2, 2, 1, 2, 2, 1}, 1, 2}, Layout{"moe_odd", {1, 4, 1, 1, 2, 1}},
                   Layout{"moe_a27b", {1, 3, 1, 1, 1, 1}}}) {  // a rank is without tokens in the second round
    SCOPED_TRACE(l.str());
    l.zero = 2;
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

TEST(Features, OtherBalanceTerms) {
  for (const MeshSpec& mesh : all_axes()) {
    Layout l{"moe_mixed", mesh, 1};
    l.aux_kinds = {AuxKind::kSwitch};
    l.z_loss = 0.01;
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

// Moments of 8 bits: meshes differ where a shard's edge cuts a block, by roundings of 8 bits; and the losses
// are those of fp32 moments to much less than what a step gains.
TEST(Features, CodedMoments) {
  for (const MeshSpec& mesh :
       {MeshSpec{1, 3, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{2, 1, 1, 2, 2, 1}})
    for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
      Layout l{"moe_mixed", mesh, 1};
      SCOPED_TRACE(l.str() + " " + name_of(precision));
      l.precision = precision;
      const Outcome plain = one_rank(l);
      l.optimizer = OptimizerKind::kAdamW8bit;
      const Outcome &one = one_rank(l), many = run_in_layout(l);
      const bool fp32 = l.precision == Precision::kFp32;
      for (std::size_t i = 0; i < plain.losses.size(); ++i) {
        EXPECT_NEAR(one.losses[i], plain.losses[i], (fp32 ? 3e-4 : 3e-3) * plain.losses[i]) << i;
        EXPECT_NEAR(many.losses[i], one.losses[i],
                    (fp32 ? 1e-6 : test::kMeanLossRoundingOfBF16) * one.losses[i])
            << i;
      }
      EXPECT_NE(one.losses.back(), plain.losses.back());
      for (const auto& [name, w] : one.weights) {
        EXPECT_LT(relative_distance(w, many.weights.at(name)), fp32 ? 1e-4 : 5e-2) << name;
      }
    }
}

TEST(Features, RecomputationIsTheSameToTheBit) {
  std::vector<MeshSpec> meshes = all_axes();
  meshes.push_back({});                  // one rank has all experts: their rows are gathered again
  meshes.push_back({1, 1, 1, 2, 1, 1});  // tp alone
  for (const MeshSpec& mesh : meshes) {
    Layout l{"moe_mixed", mesh, 1};
    const Outcome kept = run_in_layout(l);
    for (const auto& policy : kNames<Recompute>.built) {
      if (policy.value == l.recompute) continue;
      l.recompute = policy.value;
      const Outcome again = run_in_layout(l);
      l.recompute = Recompute::kNone;
      EXPECT_EQ(kept.losses, again.losses) << mesh.str() << ' ' << policy.name;
      EXPECT_EQ(kept.weights, again.weights) << mesh.str() << ' ' << policy.name;
    }
  }
}

// One micro-batch on one rank and the same tokens dealt to the ranks along ep: every expert adds up the same rows in
// the same order, so its gradient is the same to the bit. (Without the balance term, whose pool is the micro-batch.)
TEST(Features, ExpertGradientsAreBitwiseUnderEp) {
  Layout one{"moe_a27b", {}, 4};
  one.aux_loss = 0;
  const Outcome expected = run_in_layout(one);
  for (const int ep : {2, 4}) {
    Layout l = one;
    l.mesh.dp = l.mesh.ep = ep;
    l.micro_batch = 4 / ep;
    const Outcome many = run_in_layout(l);
    for (const auto& [name, gradient] : expected.gradients)
      if (name.find("moe.gate_up") != std::string::npos || name.find("moe.down") != std::string::npos) {
        EXPECT_EQ(gradient, many.gradients.at(name)) << name << " ep " << ep;
      }
  }
}

// Root of the mean square of how far apart two lists of losses are, relative to the losses.
double drift(const Outcome& a, const Outcome& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.losses.size(); ++i) sum += std::pow(a.losses[i] / b.losses[i] - 1, 2);
  return std::sqrt(sum / static_cast<double>(a.losses.size()));
}

// How far one rank's bf16 losses are from `exact`, at most, over orders of summation: shuffled neurons, and
// the same sequences in other micro-batches.
double largest_drift_of_orders(const Layout& one, const Outcome& exact) {
  double largest = 0;
  for (std::uint64_t seed = 0; seed <= 6; ++seed) {
    Layout other = one;
    other.order_seed = seed;
    other.micro_batch = 1 << seed % 3;
    largest = std::max(largest, drift(run_in_layout(other), exact));
  }
  return largest;
}

// In bf16 a layout leads the losses no further away from those of fp32 than another order of sums on one rank
// does: on average over meshes not at all, and none by half as much again. (Without the balance term, whose
// pool is the micro-batch.)
TEST(Features, Bf16DriftsNoFurtherThanAnotherOrderOfSums) {
  for (const Precision reduce : {Precision::kFp32, Precision::kBf16})
    for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_mixed"}) {
      SCOPED_TRACE(fmt::format("{}, gradients reduced in {}", model, name_of(reduce)));
      Layout one{model, {}, 1};
      one.steps = 10;
      one.aux_loss = 0;
      const Outcome exact = run_in_layout(one);
      one.precision = Precision::kBf16;
      one.reduce = reduce;
      const double of_orders = largest_drift_of_orders(one, exact);
      const MeshSpec meshes[] = {
          {2, 1, 2, 2, 4, 1}, {1, 2, 1, 2, 2, 2}, {1, 4, 1, 1, 2, 1}, {1, 1, 1, 2, 2, 1}};
      double sum = 0;
      for (const MeshSpec& mesh : meshes) {
        Layout l = one;
        l.mesh = mesh;
        if (l.model == "dense_tied_gqa") l.mesh.ep = l.mesh.etp = 1;
        const double of_layout = drift(run_in_layout(l), exact);
        EXPECT_LT(of_layout, 1.5 * of_orders) << l.str();
        EXPECT_LT(of_layout, 1e-2) << l.str();
        sum += of_layout;
      }
      EXPECT_LT(sum / std::size(meshes), of_orders);
    }
}

// Mixtures of other families, along each axis and under some together.
TEST(Families, EqualOneRank) {
  for (const char* model : {"mixtral", "qwen3_moe", "deepseek", "dots1", "dbrx"}) {
    int meshes = 0;
    for (const MeshSpec& mesh :
         {MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 1, 1, 2, 1, 2}, MeshSpec{2, 1, 1, 1, 1, 1},
          MeshSpec{2, 1, 1, 2, 2, 1}, MeshSpec{1, 2, 1, 2, 2, 2}, MeshSpec{1, 1, 2, 2, 2, 1}}) {
      const Layout l{model, mesh};
      if (!is_possible(l, Golden(model))) continue;  // sequences that cp does not divide
      SCOPED_TRACE(l.str());
      expect_equal(one_rank(l), run_in_layout(l));
      ++meshes;
    }
    EXPECT_GE(meshes, 5) << model;
  }
}

// Sixteen ranks: a seeded sample of a hundred meshes, or three of them.
TEST(Sixteen, RandomMeshes) {
  const char* mode = std::getenv("UPMOE_LAYOUTS");
  const std::size_t count = mode != nullptr && std::string(mode) == "all" ? 100 : 3;
  std::vector<Layout> all;
  for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_odd", "moe_mixed"})
    for (const Layout& l : test::meshes(model, 16)) all.push_back(l);
  ASSERT_FALSE(all.empty());
  for (std::size_t i = 0; i < count; ++i) {
    const Layout& l = all[philox(16, i)[0] % all.size()];
    SCOPED_TRACE(l.str());
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

// The files that transformers and PyTorch made in fp64, ten steps, under meshes of every axis.
std::vector<Layout> golden_layouts(int ranks) {
  std::vector<Layout> all;
  for (const char* model : {"dense", "dense_tied_gqa", "moe_a27b", "moe_renorm", "moe_mixed", "moe_odd",
                            "mixtral", "qwen3_moe", "deepseek", "dots1", "dbrx"}) {
    const Golden golden(model);
    for (Layout l : test::meshes(model, ranks)) {
      // The pool of the balance term is the micro-batch: the files have four sequences in one, or two (moe_a27b).
      l.micro_batch = l.mesh.dp == 1 ? 4 : 2;
      l.steps = 10;
      const bool has_file = l.mesh.dp == 1 || (l.mesh.dp == 2 && l.model == "moe_a27b");
      if (has_file && test::is_possible(l, golden)) all.push_back(l);
    }
  }
  return all;
}

void expect_golden(const Layout& l, const Outcome& found) {
  const Golden golden(l.model);
  const std::string prefix = l.micro_batch == 4 ? "" : "accumulated.";
  const auto losses = golden.values<double>(prefix + "losses"),
             norms = golden.values<double>(prefix + "grad_norms");
  for (std::size_t i = 0; i < losses.size(); ++i) {
    EXPECT_NEAR(found.losses[i], losses[i], 2e-6 * losses[i]) << l.str() << " step " << i + 1;
    EXPECT_NEAR(found.norms[i], norms[i], 2e-4 * norms[i]) << l.str() << " step " << i + 1;
    if (golden.config().num_experts == 0) continue;
    const double aux = golden.values<double>(prefix + "auxes")[i];
    EXPECT_NEAR(found.auxes[i], aux, 1e-5 * aux) << l.str() << " step " << i + 1;
  }
  if (!prefix.empty()) return;
  for (const ParamSpec& p : make_param_table(golden.config())) {
    const std::vector<float>& last = (p.trained ? found.weights : found.buffers).at(p.name);
    EXPECT_LT(relative_distance(golden.parameter(p, "final."), last), 1e-4) << l.str() << " " << p.name;
  }
}

TEST(GoldenFiles, UnderMeshesOfEveryAxis) {
  for (const int ranks : {2, 4, 6, 8}) {
    const std::vector<Layout> all = golden_layouts(ranks);
    for (std::uint64_t i = 0; i < 3; ++i) {
      const Layout& l = all[philox(5, static_cast<std::uint64_t>(ranks) * 100 + i)[0] % all.size()];
      expect_golden(l, run_in_layout(l));
    }
  }
}

// Adds up what the ranks hold: every element of a whole tensor lies on one of them, the others have zero.
void gather(Communicator& world, const ModelConfig& config, Tensors& tensors) {
  for (const ParamSpec& p : make_param_table(config)) {
    std::vector<float>& whole = tensors[p.name];
    whole.resize(static_cast<std::size_t>(p.shape.elements()));
    world.all_reduce(host_view(whole.data(), {p.shape.elements()}), ReduceOp::kSum);
  }
}

Outcome run_over_mpi(Communicator& world, const Layout& l) {
  const Golden golden(l.model);
  Outcome outcome;
  std::mutex mutex;
  test::run_rank(world, golden, l, outcome, mutex);
  gather(world, golden.config(), outcome.gradients);
  gather(world, golden.config(), outcome.weights);
  return outcome;
}

void expect_bitwise(const Layout& l, const Outcome& mine) {
  const Outcome threads = run_in_layout(l);
  EXPECT_EQ(mine.losses, threads.losses) << l.str();
  EXPECT_EQ(mine.norms, threads.norms) << l.str();
  EXPECT_EQ(mine.auxes, threads.auxes) << l.str();
  EXPECT_EQ(mine.gradients, threads.gradients) << l.str();
  EXPECT_EQ(mine.weights, threads.weights) << l.str();
}

// Under mpirun: one mesh for each model, to the bit what threads give (and so, by the tests above, what one
// rank gives), and the golden files under two meshes more.
void compare_over_mpi(Communicator& world) {
  for (const char* model : {"moe_a27b", "moe_mixed", "dense_tied_gqa", "moe_odd"}) {
    const std::vector<Layout> all = test::meshes(model, world.size());
    if (all.empty()) continue;
    const Layout& l = all[philox(24, all.size())[0] % all.size()];
    const Outcome mine = run_over_mpi(world, l);
    if (world.rank() == 0) expect_bitwise(l, mine);
    if (world.rank() == 0) fmt::print("over MPI, bitwise as over threads: {}\n", l.str());
  }
  const std::vector<Layout> golden = golden_layouts(world.size());
  for (std::size_t i = 0; i < std::min<std::size_t>(2, golden.size()); ++i) {
    const Layout& l = golden[(philox(24, golden.size())[0] + i * golden.size() / 2) % golden.size()];
    const Outcome mine = run_over_mpi(world, l);
    if (world.rank() == 0) expect_golden(l, mine);
    if (world.rank() == 0) fmt::print("over MPI, as the golden file: {}\n", l.str());
  }
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  testing::InitGoogleTest(&argc, argv);
  if (runtime.world().size() == 1) return RUN_ALL_TESTS();
  upmoe::compare_over_mpi(runtime.world());
  return testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed() ? 1 : 0;
}

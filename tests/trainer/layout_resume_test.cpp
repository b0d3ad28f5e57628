// Saved under one mesh, loaded under another: weights, masters and moments to the bit, and the run goes on
// with the losses of a run that never stopped.

#include <gtest/gtest.h>

#include <filesystem>

#include "kernels/core/philox.h"
#include "parallel/thread_comm.h"
#include "tests/support/layout_outcomes.h"
#include "tests/support/temporary_directory.h"
#include "trainer/checkpoint.h"
#include "trainer/checkpoint_choice.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using test::Golden;
using test::Layout;
using test::Outcome;
using test::Tensors;

constexpr std::int64_t kHalf = 2;

// What the optimizer of this rank owns.
void collect(Session& s, Tensors& all, std::mutex& mutex) {
  const std::lock_guard lock(mutex);
  for (const OwnedSlice& slice : s.optimizer.slices()) {
    const StoredParam& p = *slice.param;
    test::place(s.memory.exec, all, p.spec.name + " weight", p, slice.weight);
    std::vector<float> m(static_cast<std::size_t>(slice.weight.elements())), v(m.size());
    const TensorView m_n = host_view(m.data(), slice.weight.shape),
                     v_n = host_view(v.data(), slice.weight.shape);
    save_moments(s.memory.exec, slice, m_n, v_n);
    test::place(s.memory.exec, all, p.spec.name + " m", p, m_n);
    test::place(s.memory.exec, all, p.spec.name + " v", p, v_n);
    if (slice.has_master()) test::place(s.memory.exec, all, p.spec.name + " master", p, slice.master);
  }
  for (const StoredParam& p : s.params.all())
    if (!p.spec.trained && p.owned.size() > 0)
      test::place(s.memory.exec, all, p.spec.name + " buffer", p, p.owned_value());
}

// Half the run under `layout`: from the golden weights, or from a checkpoint; saves at its end.
std::vector<double> half_run(const Layout& layout, const fs::path& checkpoints, bool resume,
                             Tensors& at_start, Tensors& at_end) {
  const Golden golden(layout.model);
  std::vector<double> losses;
  std::mutex mutex;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    const fs::path tokens = checkpoints / fmt::format("tokens_{}.h5", world.rank());
    golden.write_tokens(tokens);
    Session s(test::run_of(layout, golden, tokens), test::config_of(layout, golden), world);
    TrainState state;
    if (resume) {
      state = load_checkpoint(ShardStore(*choose_checkpoint(checkpoints, world).newest), s);
    } else {
      s.params.load(s.memory.exec, test::weights_of(layout, golden));
      s.optimizer.reset(s.memory.exec);
    }
    collect(s, at_start, mutex);
    s.open_data(state.samples);
    Trainer trainer(s);
    for (std::int64_t i = 1; i <= kHalf; ++i) {
      const StepReport r = trainer.step(state.step + i);
      if (world.rank() == 0) losses.push_back(r.loss);
    }
    state.step += kHalf;
    state.samples = state.step * s.run.train.global_batch;
    state.source = "golden";
    state.fingerprint = s.data->fingerprint();
    CheckpointWriter writer(checkpoints);
    writer.begin(s, state, world, false);
    writer.finish(world);
    collect(s, at_end, mutex);
  });
  return losses;
}

struct Halves {
  std::vector<double> losses;  // of both
  Tensors saved, loaded, end;
};

// The whole run: the first half under `from`, the second from its checkpoint on under `to`.
Halves in_halves(const Layout& from, const Layout& to) {
  const test::TemporaryDirectory folder;
  const fs::path& dir = folder.path();
  Halves run;
  Tensors start;
  run.losses = half_run(from, dir, false, start, run.saved);
  const std::vector<double> rest = half_run(to, dir, true, run.loaded, run.end);
  run.losses.insert(run.losses.end(), rest.begin(), rest.end());
  return run;
}

struct Pair {
  Layout from, to;
};

std::vector<Pair> random_pairs(std::size_t count) {
  std::vector<Pair> pairs;
  std::uint64_t next = 0;
  const auto roll = [&](std::size_t n) { return philox(77, next++)[0] % n; };
  const std::vector<std::string> models{"dense_tied_gqa", "moe_a27b", "moe_odd", "moe_mixed"};
  while (pairs.size() < count) {
    const std::string& model = models[roll(models.size())];
    const auto any = [&] {
      const std::vector<Layout> all = test::meshes(model, 1 + static_cast<int>(roll(8)));
      return all.empty() ? Layout{model, {}} : all[roll(all.size())];
    };
    Pair p{any(), any()};
    p.from.precision = p.to.precision = roll(4) == 0 ? Precision::kBf16 : Precision::kFp32;
    pairs.push_back(p);
  }
  return pairs;
}

class LayoutResume : public testing::TestWithParam<Pair> {};

TEST_P(LayoutResume, GoesOnInAnotherMesh) {
  const auto& [from, to] = GetParam();
  const auto [losses, saved, loaded, end] = in_halves(from, to);
  EXPECT_EQ(saved, loaded);

  Layout undisturbed = from;
  undisturbed.steps = 2 * kHalf;
  const Outcome& whole = test::one_rank(undisturbed);
  const double limit = from.precision == Precision::kBf16 ? 1e-2 : 1e-6;
  ASSERT_EQ(losses.size(), whole.losses.size());
  for (std::size_t i = 0; i < losses.size(); ++i)
    EXPECT_NEAR(losses[i], whole.losses[i], limit * whole.losses[i]) << "step " << i + 1;
}

// Three experts from four ranks, of which one has none, to one rank, to others, and back.
TEST(RanksWithoutExperts, GoOnInAnotherMesh) {
  const MeshSpec four{1, 4, 1, 1, 4, 1};
  for (const auto& [from, to] : {std::pair{four, MeshSpec{}},
                                 {MeshSpec{}, four},
                                 {four, MeshSpec{1, 2, 1, 2, 2, 2}},
                                 {MeshSpec{2, 2, 1, 2, 4, 1}, four}})
    for (const int zero : {1, 2}) {
      Layout begin = test::of_three_experts(from), other = test::of_three_experts(to);
      begin.zero = other.zero = zero;
      SCOPED_TRACE(fmt::format("{} to {}, zero {}", begin.str(), other.str(), zero));
      const Halves moved = in_halves(begin, other), stayed = in_halves(begin, begin);
      EXPECT_EQ(moved.saved, moved.loaded);
      EXPECT_EQ(stayed.saved, stayed.loaded);
      begin.steps = 2 * kHalf;
      EXPECT_EQ(stayed.losses, test::run_in_layout(begin).losses);
      const Outcome& whole = test::one_rank(begin);
      ASSERT_EQ(moved.losses.size(), whole.losses.size());
      for (std::size_t i = 0; i < moved.losses.size(); ++i)
        EXPECT_NEAR(moved.losses[i], whole.losses[i], 1e-6 * whole.losses[i]) << "step " << i + 1;
    }
}

TEST(LoraResume, ToTheBitAndInAnotherMesh) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    Layout from{"moe_a27b", {1, 2, 1, 2, 2, 2}};
    from.lora = {3, 6, {LoraTarget::kQuery, LoraTarget::kOutput, LoraTarget::kUp, LoraTarget::kDown}};
    from.precision = precision;
    Layout to = from;
    to.mesh = {2, 1, 1, 1, 1, 1};
    const Halves moved = in_halves(from, to), stayed = in_halves(from, from);
    EXPECT_EQ(moved.saved, moved.loaded);
    EXPECT_EQ(stayed.saved, stayed.loaded);
    EXPECT_TRUE(stayed.saved.contains("layers.1.moe.up.lora_B_EFL m"));
    EXPECT_FALSE(stayed.saved.contains("layers.1.attn.q_NHD m"));
    from.steps = 2 * kHalf;
    const Outcome whole = test::run_in_layout(from);
    EXPECT_EQ(stayed.losses, whole.losses);
    for (const auto& [name, w] : whole.weights) EXPECT_EQ(stayed.end.at(name + " weight"), w) << name;
  }
}

class Fp32Routers : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  // bf16 with routers of this dtype and a buffer.
  static Layout layout(MeshSpec mesh, RouterDType router) {
    Layout l{"moe_mixed", mesh};
    l.precision = Precision::kBf16;
    l.router = router;
    l.router_bias = true;
    return l;
  }
  static void expect_routers(const Tensors& found, const Tensors& saved, const char* kind, const char* from) {
    int routers = 0;
    for (const auto& [name, values] : saved) {
      if (!name.ends_with(std::string("moe.router_ED ") + from)) continue;
      EXPECT_EQ(found.at(name.substr(0, name.find(' ') + 1) + kind), values) << name;
      ++routers;
    }
    EXPECT_GT(routers, 0) << from;
  }
  static void expect_moments_and_buffers(const Tensors& found, const Tensors& saved) {
    int buffers = 0;
    for (const auto& [name, values] : saved) {
      if (name.ends_with(" m") || name.ends_with(" v")) {
        EXPECT_EQ(found.at(name), values) << name;
      }
      if (!name.ends_with(" buffer")) continue;
      EXPECT_EQ(found.at(name), values) << name;
      for (std::size_t i = 0; i < values.size(); ++i)
        EXPECT_EQ(values[i], test::in_buffer(static_cast<std::int64_t>(i))) << name;
      ++buffers;
    }
    EXPECT_GT(buffers, 0);
  }

  const test::TemporaryDirectory folder_;
  const fs::path dir_ = folder_.path() / "run";
  Tensors start_, saved_, loaded_, end_;
};

TEST_F(Fp32Routers, ResumeToTheBit) {
  for (const int zero : {1, 2})
    for (const MeshSpec& mesh :
         {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{2, 1, 1, 2, 2, 1}, MeshSpec{1, 1, 2, 1, 1, 1}}) {
      SetUp();
      Layout l = layout(mesh, RouterDType::kFp32);
      l.zero = zero;
      SCOPED_TRACE(fmt::format("{} zero {}", l.str(), zero));
      start_ = saved_ = loaded_ = end_ = {};
      std::vector<double> losses = half_run(l, dir_, false, start_, saved_);
      const std::vector<double> rest = half_run(l, dir_, true, loaded_, end_);
      losses.insert(losses.end(), rest.begin(), rest.end());
      EXPECT_EQ(saved_, loaded_);
      expect_moments_and_buffers(loaded_, saved_);
      l.steps = 2 * kHalf;
      const Outcome whole = test::run_in_layout(l);
      EXPECT_EQ(losses, whole.losses);
      for (const auto& [name, w] : whole.weights) EXPECT_EQ(end_.at(name + " weight"), w) << name;
    }
}

TEST_F(Fp32Routers, GoOnInAnotherMesh) {
  half_run(layout({1, 2, 1, 2, 2, 1}, RouterDType::kFp32), dir_, false, start_, saved_);
  half_run(layout({2, 3, 1, 1, 1, 1}, RouterDType::kFp32), dir_, true, loaded_, end_);
  EXPECT_EQ(saved_, loaded_);
  expect_moments_and_buffers(end_ = loaded_, saved_);
}

// A router's best value goes on, whichever of the two runs has it as weight or as master.
TEST_F(Fp32Routers, AreConvertedFromBf16) {
  half_run(layout({1, 2, 1, 1, 2, 1}, RouterDType::kAuto), dir_, false, start_, saved_);
  half_run(layout({1, 1, 1, 2, 1, 1}, RouterDType::kFp32), dir_, true, loaded_, end_);
  expect_routers(loaded_, saved_, "weight", "master");
  EXPECT_FALSE(loaded_.contains("layers.1.moe.router_ED master"));
  expect_moments_and_buffers(loaded_, saved_);
}
TEST_F(Fp32Routers, AreConvertedToBf16) {
  half_run(layout({1, 2, 1, 1, 2, 1}, RouterDType::kFp32), dir_, false, start_, saved_);
  half_run(layout({1, 1, 1, 2, 1, 1}, RouterDType::kAuto), dir_, true, loaded_, end_);
  expect_routers(loaded_, saved_, "master", "weight");
  for (auto& [name, values] : saved_)
    if (name.ends_with("moe.router_ED weight"))
      for (float& v : values) v = to_float(to_bf16(v));
  expect_routers(loaded_, saved_, "weight", "weight");
  expect_moments_and_buffers(loaded_, saved_);
}

// Of a checkpoint from before it; and one that the model no longer has belongs to another model.
TEST_F(Fp32Routers, ABufferThatACheckpointLacksBeginsAnew) {
  Layout l = layout({1, 2, 1, 1, 1, 1}, RouterDType::kFp32);
  l.router_bias = false;
  half_run(l, dir_, false, start_, saved_);
  l.router_bias = true;
  half_run(l, dir_, true, loaded_, end_);
  int buffers = 0;
  for (const auto& [name, values] : end_) {
    if (!name.ends_with(" buffer")) continue;
    EXPECT_EQ(values, std::vector<float>(values.size(), 0.0f)) << name;
    ++buffers;
  }
  EXPECT_GT(buffers, 0);
  l.router_bias = false;
  EXPECT_THROW(half_run(l, dir_, true, loaded_, end_), Error);
}

// Checkpoints hold moments in fp32; coded again, they are what they were.
TEST(CodedMoments, ResumeToTheBit) {
  for (const MeshSpec& mesh :
       {MeshSpec{}, MeshSpec{1, 3, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 2, 4, 1}, MeshSpec{1, 4, 1, 1, 4, 1}}) {
    Layout l{"moe_mixed", mesh};
    if (mesh.dp == 4) {  // a rank without experts, beside others whose moments are coded
      l.num_experts = 3;
      l.width = 64;
    }
    l.precision = Precision::kBf16;
    l.optimizer = OptimizerKind::kAdamW8bit;
    SCOPED_TRACE(l.str());
    const auto [losses, saved, loaded, end] = in_halves(l, l);
    EXPECT_EQ(saved, loaded);
    l.steps = 2 * kHalf;
    const Outcome whole = test::run_in_layout(l);
    EXPECT_EQ(losses, whole.losses);
    for (const auto& [name, w] : whole.weights) EXPECT_EQ(end.at(name + " weight"), w) << name;
  }
}

// The biases go on from where they were, in another mesh as well.
TEST(RouterBiases, ResumeToTheBit) {
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{2, 1, 2, 1, 1, 1}}) {
    Layout l{"moe_mixed", mesh};
    l.form = RouterForm{.score = RouterScore::kSigmoid, .groups = 2, .group_topk = 1, .scale = 2.5};
    l.bias_rate = 0.01;
    l.aux_kinds = {AuxKind::kGlobal};  // with a buffer of its own
    SCOPED_TRACE(l.str());
    const auto [losses, saved, loaded, end] = in_halves(l, l);
    EXPECT_EQ(saved, loaded);
    l.steps = 2 * kHalf;
    const Outcome whole = test::run_in_layout(l);
    EXPECT_EQ(losses, whole.losses);
    ASSERT_FALSE(whole.buffers.empty());
    for (const auto& [name, bias] : whole.buffers) {
      EXPECT_EQ(end.at(name + " buffer"), bias) << name;
      if (!name.ends_with("moe.router_E")) continue;
      // Expert 0 begins with the largest bias, gets the most, and loses in every step.
      EXPECT_NEAR(bias[0], test::in_buffer(0) - static_cast<float>(l.steps) * 0.01f, 1e-6) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(RandomPairs, LayoutResume, testing::ValuesIn(random_pairs(60)), [](const auto& p) {
  return fmt::format("{}_{}_{}_to_{}", p.index, name_of(p.param.from.precision), p.param.from.str(),
                     p.param.to.str());
});

}  // namespace
}  // namespace upmoe

// Targets that loss masks leave out: the loss and every gradient are sums over those that count, divided by how many
// count in the whole step, whoever has them (torch's cross_entropy with ignore_index and reduction "mean" over the
// global batch).

#include <gtest/gtest.h>

#include <cmath>

#include "parallel/self_comm.h"
#include "tests/support/layout_outcomes.h"
#include "tests/support/reference_model.h"
#include "tests/support/temporary_directory.h"
#include "trainer/evaluation.h"
#include "trainer/stage_cost.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Golden;
using test::Layout;
using test::LossMask;
using test::one_rank;
using test::Outcome;
using test::run_in_layout;
using test::Tensors;

std::vector<Layout> masked_layouts() {
  std::vector<Layout> all;
  // Every axis; a rank without any target that counts (dp 4), and one without a micro-batch (dp 3).
  for (const MeshSpec& mesh :
       {MeshSpec{2, 1, 2, 2, 4, 1}, MeshSpec{1, 2, 1, 2, 2, 2}, MeshSpec{2, 2, 1, 1, 2, 1},
        MeshSpec{1, 1, 2, 2, 1, 4}, MeshSpec{1, 4, 1, 1, 4, 1}})
    all.push_back({"moe_mixed", mesh, 1});
  all.push_back({"moe_a27b", {1, 3, 1, 1, 1, 1}, 1});
  all.push_back({"dense_tied_gqa", {1, 2, 1, 1, 1, 1}, 2});
  all.push_back({"moe_a27b", {1, 2, 1, 1, 2, 1}, 1});
  all.back().zero = 2;
  for (Layout& l : all) l.loss_mask = LossMask::kSome;
  return all;
}

// Cross entropy of the first step's sequences in double, over the targets that count, from logits of one rank whose
// weights are the golden ones and `step` times `direction`.
double naive_loss(const Golden& golden, const Layout& l, double step, const Tensors& direction) {
  const ModelConfig config = test::config_of(l, golden);
  const auto world = make_self_communicator();
  RankModel model(config, {}, *world, {}, {.gradients = false});
  model.params.load(model.memory.exec, [&](const ParamSpec& spec, const Box& box, TensorView out) {
    std::vector<float> whole = golden.parameter(spec, "");
    if (const auto found = direction.find(spec.name); found != direction.end())
      for (std::size_t i = 0; i < whole.size(); ++i)
        whole[i] = static_cast<float>(whole[i] + step * static_cast<double>(found->second[i]));
    std::int64_t i = 0;
    Golden::for_each_index(box, spec.shape, [&](std::int64_t at) {
      out.as<float>()[i++] = whole[static_cast<std::size_t>(at)];
    });
  });
  const test::TemporaryDirectory folder;
  const std::filesystem::path tokens = folder.path() / "tokens.h5";
  golden.write_tokens(tokens, make_loss_mask(l.loss_mask, golden));
  const TokenDataset data({{tokens, 1.0, true}}, golden.seq_len(), false, 1, config.vocab_size);
  const auto V = static_cast<std::size_t>(config.vocab_size), S = static_cast<std::size_t>(golden.seq_len());
  double sum = 0, count = 0;
  const auto add = [&](std::int64_t first, ConstTensorView logits_CV) {
    std::vector<std::int32_t> in(S), targets(S);
    for (std::int64_t c = 0; c < logits_CV.shape[0]; ++c) {
      const auto row = static_cast<std::size_t>(first + c);
      data.read(static_cast<std::int64_t>(row / S), in, targets, {}, {});
      if (targets[row % S] == kIgnoredTarget) continue;
      const float* x = logits_CV.as<float>() + static_cast<std::size_t>(c) * V;
      const test::Values logits(x, x + V);
      sum += test::reference_lse(logits.data(), V) - logits[static_cast<std::size_t>(targets[row % S])];
      ++count;
    }
  };
  const EvalResult result = evaluate(model, data, {.sequences = 4, .micro_batch = 1}, add);
  EXPECT_NEAR(result.loss, sum / count, test::kUnit * result.loss);  // of the same logits
  EXPECT_EQ(static_cast<double>(result.tokens), count);
  return sum / count;
}

// The same from the logits that torch computed for those sequences.
double torch_loss(const Golden& golden, const Layout& l) {
  const std::vector<float> logits_RSV = golden.values<float>("logits");
  const std::vector<std::int32_t> tokens = golden.values<std::int32_t>("tokens");
  const std::vector<std::uint8_t> mask = make_loss_mask(l.loss_mask, golden);
  const auto V = static_cast<std::size_t>(golden.config().vocab_size),
             S = static_cast<std::size_t>(golden.seq_len());
  double sum = 0, count = 0;
  for (std::size_t t = 0; t < 4 * S; ++t) {
    if (mask[t + 1] == 0) continue;
    const auto target = static_cast<std::size_t>(tokens[t / S * (S + 1) + t % S + 1]);
    const auto row = logits_RSV.begin() + static_cast<std::ptrdiff_t>(t * V);
    const test::Values logits(row, row + static_cast<std::ptrdiff_t>(V));
    sum += test::reference_lse(logits.data(), V) - logits[target];
    ++count;
  }
  return sum / count;
}

class MaskedTargets : public testing::TestWithParam<Layout> {};

TEST_P(MaskedTargets, EqualOneRank) {
  expect_equal(one_rank(GetParam()), run_in_layout(GetParam()));
}

TEST_P(MaskedTargets, LossIsTheMeanOverThoseThatCount) {
  Layout l = GetParam();
  l.steps = 1;
  const Golden golden(l.model);
  const double expected = naive_loss(golden, l, 0, {}), of_torch = torch_loss(golden, l),
               loss = run_in_layout(l).losses[0];
  EXPECT_NEAR(loss, expected, test::kMeanLossRounding * expected);
  EXPECT_NEAR(loss, of_torch, test::kMeanLossRounding * of_torch);
}

INSTANTIATE_TEST_SUITE_P(Layouts, MaskedTargets, testing::ValuesIn(masked_layouts()),
                         [](const auto& l) { return fmt::format("{}_zero{}", l.param.str(), l.param.zero); });

TEST(LossMasks, HeldOutTargetsAreCountedOnce) {
  Layout l{"moe_mixed", {}, 1};
  l.loss_mask = LossMask::kSome;
  const Golden golden(l.model);
  const double expected = naive_loss(golden, l, 0, {});
  std::int64_t counted = 0;
  const std::vector<std::uint8_t> mask = make_loss_mask(l.loss_mask, golden);
  for (std::int64_t t = 1; t <= 4 * golden.seq_len(); ++t) counted += mask[static_cast<std::size_t>(t)];
  for (const MeshSpec& mesh : {MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 1, 1, 2, 1, 1},
                               MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{2, 1, 1, 1, 1, 1}})
    run_in_threads(mesh.world(), [&](Communicator& world) {
      const test::TemporaryDirectory folder;
      const std::filesystem::path tokens = folder.path() / "tokens.h5";
      golden.write_tokens(tokens, mask);
      Layout at = l;
      at.mesh = mesh;
      const ModelConfig config = test::config_of(l, golden);
      RankModel model(config, mesh, world, {},
                      {.gradients = false, .plan = stages_of(test::run_of(at, golden, tokens), config)});
      model.params.load(model.memory.exec, test::golden_weights(golden));
      const TokenDataset data({{tokens, 1.0, true}}, golden.seq_len(), false, 1, config.vocab_size);
      const EvalResult result = evaluate(model, data, {.sequences = 4, .micro_batch = 1});
      EXPECT_EQ(result.tokens, counted) << mesh.str();
      EXPECT_NEAR(result.loss, expected, test::kMeanLossRounding * expected) << mesh.str();
    });
}

// Along the gradient the naive loss rises by the gradient's square: a gradient divided by anything else, or with a
// masked target in it, would not have the slope of the loss. The third derivative's part falls with the step's square;
// the loss's rounding is 1e-7 over a rise of 1e-2.
TEST(LossMasks, GradientIsTheSlopeOfTheNaiveLoss) {
  Layout l{"dense_tied_gqa", {1, 4, 1, 1, 1, 1}, 1};
  l.loss_mask = LossMask::kSome;
  l.steps = 1;
  const Golden golden(l.model);
  const Outcome outcome = run_in_layout(l);
  double squares = 0;
  for (const auto& [name, gradient] : outcome.gradients)
    for (const float g : gradient) squares += static_cast<double>(g) * static_cast<double>(g);
  const double step = 2e-3 / std::sqrt(squares);
  const double rise =
      naive_loss(golden, l, step, outcome.gradients) - naive_loss(golden, l, -step, outcome.gradients);
  EXPECT_NEAR(rise / (2 * step), squares, 2e-4 * squares);
}

// Without the balance term, whose pool is the micro-batch.
TEST(LossMasks, AreTheSameInAnyMicroBatches) {
  Layout one{"moe_a27b", {}, 4};
  one.loss_mask = LossMask::kSome;
  one.aux_loss = 0;
  Layout four = one;
  four.micro_batch = 1;
  const Outcome expected = run_in_layout(one), outcome = run_in_layout(four);
  for (std::size_t i = 0; i < expected.losses.size(); ++i)
    EXPECT_NEAR(outcome.losses[i], expected.losses[i], test::kMeanLossRounding * expected.losses[i]);
  for (const auto& [name, gradient] : expected.gradients)
    EXPECT_LT(test::relative_distance(gradient, outcome.gradients.at(name), 1e-3 * expected.norms[0]), 1e-5)
        << name;
}

TEST(LossMasks, AMaskThatCountsAllChangesNoBit) {
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}}) {
    Layout l{"moe_a27b", mesh, 1};
    const Outcome without = run_in_layout(l);
    l.loss_mask = LossMask::kAll;
    const Outcome with = run_in_layout(l);
    EXPECT_EQ(with.losses, without.losses);
    EXPECT_EQ(with.norms, without.norms);
    EXPECT_EQ(with.weights, without.weights);
  }
}

TEST(LossMasks, AStepWithoutAnyIsRefusedInWords) {
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}}) {
    Layout l{"moe_a27b", mesh, 1};
    l.loss_mask = LossMask::kNothing;
    const Golden golden(l.model);
    const test::TemporaryDirectory folder;
    const std::filesystem::path tokens = folder.path() / "tokens.h5";
    golden.write_tokens(tokens, make_loss_mask(l.loss_mask, golden));
    try {
      run_in_threads(mesh.world(), [&](Communicator& world) {
        Session s(test::run_of(l, golden, tokens), test::config_of(l, golden), world);
        s.params.load(s.memory.exec, test::golden_weights(golden));
        s.optimizer.reset(s.memory.exec);
        s.open_data(0);
        Trainer(s).step(1);
      });
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("step 1: loss masks leave none"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace upmoe

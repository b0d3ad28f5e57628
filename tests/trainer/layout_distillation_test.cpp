// Runs that learn from a teacher: every mesh computes what one rank does, the loss is the naive one of both models'
// logits, the gradient its slope, a model that is its own teacher learns nothing from it; and what is booked and held
// of the teacher.

#include <gtest/gtest.h>

#include <cmath>

#include "parallel/self_comm.h"
#include "tests/support/layout_outcomes.h"
#include "tests/support/reference_model.h"
#include "tests/support/taught.h"
#include "tests/support/temporary_directory.h"
#include "trainer/evaluation.h"
#include "trainer/rehearsal.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Golden;
using test::Layout;
using test::LossMask;
using test::Outcome;
using test::relative_distance;
using test::run_taught;
using test::taught_by;
using test::Tensors;
using test::Values;

constexpr double kWeight = 0.6, kTemperature = 2;

// A mixture that learns from a dense model of the same vocabulary; or a dense model from that mixture.
const std::string kMixture = "moe_a27b", kDense = "dense";

Layout taught(const std::string& model, const MeshSpec& mesh, double weight = kWeight) {
  Layout l{model, mesh, 1};
  l.change = taught_by(model == kMixture ? kDense : kMixture, weight, kTemperature);
  l.steps = 3;
  l.eps = 1e-6;
  return l;
}

std::vector<Layout> taught_layouts() {
  std::vector<Layout> all;
  // pp, dp, cp, tp, ep, etp: each but pp alone, then together.
  for (const MeshSpec& mesh :
       {MeshSpec{1, 2, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 1, 1, 2, 1, 1},
        MeshSpec{1, 2, 1, 1, 1, 2}, MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{1, 1, 1, 4, 2, 1},
        MeshSpec{1, 2, 2, 2, 4, 1}, MeshSpec{1, 3, 1, 1, 1, 1}})  // dp 3: a rank without a micro-batch
    all.push_back(taught(kMixture, mesh));
  all.push_back(taught(kMixture, {1, 2, 1, 2, 2, 1}));
  all.back().loss_mask = LossMask::kSome;
  all.push_back(taught(kMixture, {1, 2, 1, 2, 2, 1}));
  all.back().zero = 2;
  all.back().recompute = Recompute::kBlock;
  all.push_back(taught(kDense, {1, 2, 1, 2, 1, 1}));
  all.back().loss_mask = LossMask::kSome;
  return all;
}

class Taught : public testing::TestWithParam<Layout> {
 protected:
  static std::string teacher() { return GetParam().model == kMixture ? kDense : kMixture; }
};

TEST_P(Taught, EqualsOneRank) {
  Layout one = GetParam();
  one.mesh = {};
  one.zero = 1;
  const Outcome expected = run_taught(one, teacher()), found = run_taught(GetParam(), teacher());
  expect_equal(expected, found);
  ASSERT_EQ(found.distilled.size(), expected.distilled.size());
  for (std::size_t i = 0; i < expected.distilled.size(); ++i) {
    EXPECT_GT(expected.distilled[i], 0.1) << "models that agree say nothing";
    EXPECT_NEAR(found.distilled[i], expected.distilled[i], test::kMeanLossRounding * expected.distilled[i])
        << "step " << i + 1;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Taught, testing::ValuesIn(taught_layouts()), [](const auto& l) {
  return fmt::format("{}_zero{}{}", l.param.str(), l.param.zero,
                     l.param.loss_mask == LossMask::kNone ? "" : "_masked");
});

// Logits of the first step's four sequences, a row for each token; weights are the golden ones and `step` times
// `direction`. With the targets, -1 where none counts.
struct Logits {
  std::vector<Values> rows;
  std::vector<std::int32_t> targets;
};

Logits logits_of(const Golden& golden, const Golden& data_of, LossMask mask, double step = 0,
                 const Tensors& direction = {}) {
  const auto world = make_self_communicator();
  RankModel model(golden.config(), {}, *world, {}, {.gradients = false});
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
  data_of.write_tokens(tokens, make_loss_mask(mask, data_of));
  const TokenDataset data({{tokens, 1.0, mask != LossMask::kNone}}, data_of.seq_len(), false, 1,
                          golden.config().vocab_size);
  const auto V = static_cast<std::size_t>(golden.config().vocab_size),
             S = static_cast<std::size_t>(data_of.seq_len());
  Logits all{std::vector<Values>(4 * S), std::vector<std::int32_t>(4 * S)};
  const auto add = [&](std::int64_t first, ConstTensorView logits_CV) {
    std::vector<std::int32_t> in(S), targets(S);
    for (std::int64_t c = 0; c < logits_CV.shape[0]; ++c) {
      const auto row = static_cast<std::size_t>(first + c);
      data.read(static_cast<std::int64_t>(row / S), in, targets, {}, {});
      const float* x = logits_CV.as<float>() + static_cast<std::size_t>(c) * V;
      all.rows[row] = Values(x, x + V);
      all.targets[row] = targets[row % S];
    }
  };
  evaluate(model, data, {.sequences = 4, .micro_batch = 1}, add);
  return all;
}

struct NaiveLoss {
  double loss = 0, distilled = 0;
  double total() const { return (1 - kWeight) * loss + kWeight * distilled; }
};

NaiveLoss naive_loss(const Logits& student, const Logits& teacher) {
  NaiveLoss sum;
  double count = 0;
  for (std::size_t t = 0; t < student.rows.size(); ++t) {
    if (student.targets[t] == kIgnoredTarget) continue;
    ++count;
    Values z = student.rows[t], q = teacher.rows[t];
    const std::size_t V = z.size();
    sum.loss += test::reference_lse(z.data(), V) - z[static_cast<std::size_t>(student.targets[t])];
    for (double& x : z) x /= kTemperature;
    for (double& x : q) x /= kTemperature;
    const double of_z = test::reference_lse(z.data(), V), of_q = test::reference_lse(q.data(), V);
    for (std::size_t v = 0; v < V; ++v)
      sum.distilled += kTemperature * kTemperature * std::exp(q[v] - of_q) * ((q[v] - of_q) - (z[v] - of_z));
  }
  return {sum.loss / count, sum.distilled / count};
}

TEST(Distillation, LossesAreTheNaiveOnes) {
  for (const LossMask mask : {LossMask::kNone, LossMask::kSome})
    for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 2, 2, 1}}) {
      Layout l = taught(kMixture, mesh);
      l.loss_mask = mask;
      l.steps = 1;
      const Golden student(kMixture), teacher(kDense);
      const NaiveLoss expected =
          naive_loss(logits_of(student, student, mask), logits_of(teacher, student, mask));
      const Outcome found = run_taught(l, kDense);
      EXPECT_NEAR(found.losses[0], expected.loss, test::kMeanLossRounding * expected.loss);
      EXPECT_NEAR(found.distilled[0], expected.distilled, test::kMeanLossRounding * expected.distilled);
    }
}

// Along the gradient the naive loss rises by the gradient's square: but for the third derivative's part, which falls
// with the step's square, and the loss's own rounding, 1e-7 over a rise of 1e-2. One target of 64 too many would be
// 1e-2.
TEST(Distillation, GradientIsTheSlopeOfTheNaiveLoss) {
  for (const LossMask mask : {LossMask::kNone, LossMask::kSome}) {
    Layout l = taught(kDense, {1, 2, 1, 2, 1, 1});
    l.loss_mask = mask;
    l.steps = 1;
    const Golden student(kDense), teacher(kMixture);
    const Outcome outcome = run_taught(l, kMixture);
    double squares = 0;
    for (const auto& [name, gradient] : outcome.gradients)
      for (const float g : gradient) squares += static_cast<double>(g) * static_cast<double>(g);
    const double step = 2e-3 / std::sqrt(squares);
    const Logits taught_by_them = logits_of(teacher, student, mask);
    const auto at = [&](double length) {
      return naive_loss(logits_of(student, student, mask, length, outcome.gradients), taught_by_them).total();
    };
    EXPECT_NEAR((at(step) - at(-step)) / (2 * step), squares, 2e-4 * squares);
  }
}

// Its divergence is 0, of equal logits to the bit, and has no gradient: what is left is the cross entropy's share. By
// another op, whose exp, sum and product move a probability by some eight units; what follows is linear in it.
constexpr double kOtherOp = 8 * test::kUnit;

TEST(Distillation, AModelThatIsItsTeacherLearnsFromItsDataAlone) {
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 2, 2, 1}}) {
    Layout l{kMixture, mesh, 1};
    l.steps = 1;
    l.aux_loss = 0;
    const Outcome alone = test::run_in_layout(l);
    for (const double weight : {0.5, 1.0}) {
      l.change = taught_by(kMixture, weight, kTemperature);
      const Outcome found = run_taught(l, kMixture);
      EXPECT_EQ(found.distilled[0], 0.0);
      EXPECT_NEAR(found.losses[0], alone.losses[0], test::kUnit * alone.losses[0]);
      EXPECT_NEAR(found.norms[0], (1 - weight) * alone.norms[0], kOtherOp * alone.norms[0]);
      for (const auto& [name, gradient] : alone.gradients) {
        std::vector<float> share = gradient;
        for (float& g : share) g *= static_cast<float>(1 - weight);
        EXPECT_LT(relative_distance(share, found.gradients.at(name), alone.norms[0]), kOtherOp) << name;
      }
    }
  }
}

// In bf16 each of some ten roundings of a block moves a token's logits by a unit of their norm: of two blocks of
// student and teacher that is sqrt(40) units of 2^-8 at the most, 2.5e-2. The divergence moves by as much of each
// token's own, and its mean over 64 of them by an eighth of it; twice that, for what tokens have in common.
TEST(Distillation, InBf16IsTheSameTwiceAndNearFp32) {
  Layout l = taught(kMixture, {1, 2, 1, 2, 2, 1});
  const Outcome fp32 = run_taught(l, kDense);
  l.precision = Precision::kBf16;
  const Outcome one = run_taught(l, kDense), again = run_taught(l, kDense);
  EXPECT_EQ(one.losses, again.losses);
  EXPECT_EQ(one.distilled, again.distilled);
  EXPECT_EQ(one.weights, again.weights);
  EXPECT_NEAR(one.distilled[0], fp32.distilled[0], std::sqrt(40.0) * test::kBF16Unit / 4 * fp32.distilled[0]);
}

TEST(DistillationCost, TheTeachersForwardIsBookedApart) {
  const Golden student(kMixture), teacher(kDense);
  Layout l{kMixture, {}, 1};
  const ModelConfig config = test::config_of(l, student);
  const auto step_of = [&] {
    Rehearsal rehearsal(test::run_of(l, student, "unused"), config, 0, 1);
    rehearsal.step();
    return std::pair{rehearsal.step().total(), rehearsal.memory_use()};
  };
  const auto [alone, memory_alone] = step_of();
  l.change = taught_by(kDense, kWeight, kTemperature);
  const auto [cost, memory] = step_of();
  EXPECT_EQ(cost.model_flops, alone.model_flops);
  EXPECT_EQ(cost.model_again, alone.model_again);
  EXPECT_EQ(alone.teacher_flops, 0);
  // Of four sequences, as `upmoe cost` counts one.
  EXPECT_DOUBLE_EQ(cost.teacher_flops,
                   4 * rehearse_forward(teacher.config(), student.seq_len()).total().model_flops);
  std::size_t values = 0;
  for (const ParamSpec& p : make_param_table(teacher.config()))
    values += static_cast<std::size_t>(p.shape.elements());
  EXPECT_EQ(memory_alone.teacher, 0u);
  EXPECT_GE(memory.teacher, 4 * values);
  EXPECT_LT(memory.teacher, 5 * values);
  EXPECT_EQ(memory.parameters, memory_alone.parameters);
  EXPECT_EQ(memory.optimizer, memory_alone.optimizer);
}

std::string problem_of(const Layout& layout) {
  const Golden golden(layout.model);
  std::string all;
  for (const std::string& p : problems_of(test::run_of(layout, golden, "unused"),
                                          test::config_of(layout, golden), layout.mesh.world()))
    all += p + "\n";
  return all;
}

TEST(DistillationProblems, AreSaidInWords) {
  EXPECT_EQ(problem_of(taught(kMixture, {1, 2, 1, 2, 2, 1})), "");
  EXPECT_NE(problem_of(taught(kMixture, {2, 1, 1, 1, 1, 1})).find("train.teacher: parallel.pp is 2"),
            std::string::npos);
  Layout other = taught(kMixture, {});
  other.change = taught_by("llama", kWeight, kTemperature);
  EXPECT_NE(problem_of(other).find("llama has a vocabulary of 104 tokens, and the model one of 128"),
            std::string::npos);
  // Positions, and heads that tp does not divide, are those of the teacher alone.
  auto short_teacher = std::make_shared<ModelConfig>(Golden(kDense).config());
  short_teacher->max_position_embeddings = 4;
  short_teacher->num_attention_heads = short_teacher->num_key_value_heads = 3;
  other = taught(kMixture, {1, 1, 1, 2, 1, 1});
  other.change = [&](RunConfig& run) { run.train.teacher = {"short", kWeight, kTemperature, short_teacher}; };
  const std::string words = problem_of(other);
  EXPECT_NE(words.find("train.teacher: data.seq_len"), std::string::npos) << words;
  EXPECT_NE(words.find("train.teacher: parallel.tp: 2 does not divide the model's 3 attention heads"),
            std::string::npos)
      << words;
}

}  // namespace
}  // namespace upmoe

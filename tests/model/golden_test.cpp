// The model against what transformers and PyTorch computed in fp64 for the same fp32 weights.

#include <gtest/gtest.h>

#include <cmath>

#include "parallel/self_comm.h"
#include "tests/support/golden.h"
#include "tests/support/same_batch.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/test_device.h"
#include "tests/support/tolerance.h"
#include "trainer/trainer.h"

namespace upmoe {
namespace {

using test::Golden;
using test::relative_distance;

// Tolerances: several times what transformers' own fp32 run differs by (tests/golden/README.md).
constexpr double kLogits = 1e-4, kGradient = 1e-4, kLoss = 2e-6, kAux = 1e-5, kNorm = 2e-4, kWeights = 1e-4;

std::vector<float> copy(Exec& ex, ConstTensorView v) {
  std::vector<float> values(static_cast<std::size_t>(v.elements()));
  ops::download(ex, host_view(values.data(), v.shape), v);
  return values;
}

struct Loaded {
  explicit Loaded(const std::string& name, std::int64_t micro_batch = 4)
      : golden(name),
        session(golden.run(folder.path() / "tokens.h5", micro_batch, 1), golden.config(), *self,
                test::test_exec().device) {
    session.params.load(session.memory.exec, golden.reader());
    session.optimizer.reset(session.memory.exec);
    session.open_data(0);
  }
  Golden golden;
  test::TemporaryDirectory folder;
  std::unique_ptr<Communicator> self = make_self_communicator();
  Session session;
};

class GoldenModel : public testing::TestWithParam<std::string> {};

TEST_P(GoldenModel, LogitsLossAndGradients) {
  Loaded l(GetParam());
  Session& s = l.session;
  const std::int64_t S = l.golden.seq_len(), V = l.golden.config().vocab_size;
  const Batch batch = s.batches->next();

  const std::vector<float> expected = l.golden.values<float>("logits");
  std::vector<float> logits(expected.size());
  s.pipeline.evaluate(s.memory.exec, batch, [&](std::int64_t row, ConstTensorView chunk_CV) {
    std::copy_n(chunk_CV.as<float>(), chunk_CV.elements(), logits.data() + row * V);
  });
  for (std::size_t i = 0; i < logits.size(); ++i)
    ASSERT_NEAR(logits[i], expected[i], kLogits) << "logit " << i;

  const double tokens = static_cast<double>(4 * S);
  test::SameBatch batches(batch, 1);
  Pipeline::Step step{.batches = batches, .loss_scale = 1.0 / tokens};
  step.balance.terms = {{AuxKind::kHf, s.run.router.aux_loss.front()}};
  s.params.forget_gradients();
  const StepSums sums = s.pipeline.run(s.memory.exec, step);
  const double loss = l.golden.values<double>("loss")[0];
  EXPECT_NEAR(sums.loss / tokens, loss, kLoss * loss);
  if (l.golden.config().num_experts > 0) {
    const double aux = l.golden.values<double>("aux")[0];
    EXPECT_NEAR(sums.aux.front(), aux, kAux * aux);
  }
  for (const StoredParam& p : s.params.all()) {
    if (!p.spec.trained) continue;
    EXPECT_LT(relative_distance(l.golden.parameter(p.spec, "grad."), copy(s.memory.exec, p.grad)), kGradient)
        << p.spec.name;
  }
}

void expect_ten_steps(const std::string& name, std::int64_t micro_batch, const std::string& prefix) {
  Loaded l(name, micro_batch);
  Trainer trainer(l.session);
  const auto losses = l.golden.values<double>(prefix + "losses"),
             norms = l.golden.values<double>(prefix + "grad_norms");
  for (std::size_t i = 0; i < 10; ++i) {
    const StepReport r = trainer.step(static_cast<std::int64_t>(i) + 1);
    EXPECT_NEAR(r.loss, losses[i], kLoss * losses[i]) << "step " << r.step;
    EXPECT_NEAR(r.grad_norm, norms[i], kNorm * norms[i]) << "step " << r.step;
    if (l.golden.config().num_experts > 0) {
      const double aux = l.golden.values<double>(prefix + "auxes")[i];
      EXPECT_NEAR(r.aux_loss, aux, kAux * aux) << "step " << r.step;
    }
  }
  if (!prefix.empty()) return;  // the file holds final weights of the other variant only
  for (const StoredParam& p : l.session.params.all())
    EXPECT_LT(relative_distance(l.golden.parameter(p.spec, "final."), copy(l.session.memory.exec, p.value)),
              kWeights)
        << p.spec.name;
}

TEST_P(GoldenModel, TenSteps) {
  expect_ten_steps(GetParam(), 4, "");
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenModel, testing::ValuesIn(test::golden_cases()));

TEST(GoldenAccumulated, TenSteps) {
  expect_ten_steps("moe_a27b", 2, "accumulated.");
}

}  // namespace
}  // namespace upmoe

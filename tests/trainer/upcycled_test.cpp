// An upcycled directory in the trainer: what should preserve the dense model's function does, and the neurons
// that only fill the width up can learn.

#include <gtest/gtest.h>

#include <set>

#include "data/model_source.h"
#include "parallel/self_comm.h"
#include "tests/support/preserving_recipes.h"
#include "tests/support/tiny_dense.h"
#include "tests/support/token_file.h"
#include "trainer/session.h"
#include "trainer/trainer.h"
#include "upcycle/recipe_problems.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kSeq = 16, kVocab = 48, kDenseWidth = 86, kSharedWidth = 88;

class Upcycled : public testing::Test {
 protected:
  void SetUp() override {
    test::TinyShape shape;
    const ModelConfig config = parse_model_config(test::tiny_config_json(shape), "tiny");
    test::write_tiny_dense(dense(), shape, test::tiny_weights(config));
    std::vector<std::uint32_t> tokens;
    for (std::uint32_t i = 0; i < 40 * kSeq + 1; ++i) tokens.push_back(i * i % 47 + i % 2);
    write_token_file(temporary_.path() / "tokens.h5", tokens, {}, kVocab);
  }
  fs::path dense() const { return temporary_.path() / "dense"; }

  // 60 experts of a quarter of the dense width, as the full-size recipe cuts them.
  fs::path upcycled(double routed_scale) {
    UpcycleConfig recipe;
    recipe.target = {60, 4, 22, kSharedWidth, false};
    recipe.experts.reinit = 0.5;
    recipe.experts.scale = routed_scale;
    return made(recipe, dense(), fmt::format("moe_{}", routed_scale));
  }
  fs::path made(const UpcycleConfig& recipe, const fs::path& from, const std::string& name) {
    const fs::path to = temporary_.path() / name;
    UpcycleOptions options;
    options.from = from;
    options.to = to;
    options.progress = false;
    const auto self = make_self_communicator();
    upcycle(recipe, options, *self);
    return to;
  }

  std::unique_ptr<Session> load(const fs::path& dir) {
    RunConfig run;
    run.data.train = {{(temporary_.path() / "tokens.h5").string(), 1.0}};
    run.data.seq_len = kSeq;
    run.data.shuffle = false;
    run.train.steps = 1;
    run.train.global_batch = 8;
    run.train.micro_batch = 8;
    run.router.aux_loss = {0.0};
    run.optimizer.lr = 1e-3;
    run.schedule.name = ScheduleKind::kConstant;
    const auto source = open_model(dir);
    auto session = std::make_unique<Session>(run, source->config(), *self_);
    session->params.load(session->memory.exec, [&](const ParamSpec& p, const Box& box, TensorView out) {
      source->read(p, box, out);
    });
    session->optimizer.reset(session->memory.exec);
    session->open_data(0);
    return session;
  }

  test::TemporaryDirectory temporary_;
  std::unique_ptr<Communicator> self_ = make_self_communicator();
};

TEST_F(Upcycled, SharedExpertCarriesTheDenseFunction) {
  const double dense_loss = Trainer(*load(dense())).step(1).loss;
  const double preserved = Trainer(*load(upcycled(0.0))).step(1).loss;
  EXPECT_NEAR(preserved, dense_loss, 1e-5 * dense_loss);
  // With routed experts that are not silent the loss is another one: the comparison above can fail.
  const double disturbed = Trainer(*load(upcycled(20.0))).step(1).loss;
  EXPECT_GT(std::abs(disturbed - dense_loss), 1e-3);
}

// The whole model, with what stands around its mixtures: norms of heads, a window, a dense layer in front.
TEST_F(Upcycled, KeepsTheLossOfEveryDenseFamily) {
  std::set<std::string> pairs;
  for (const Family* family : families()) {
    if (is_mixture(*family) || family->mixtures.empty()) continue;
    for (const int window : {0, 5}) {
      if (window > 0 && !family->carries.has(Trait::kWindow)) continue;
      const fs::path from = temporary_.path() / fmt::format("{}_{}", family->model_type, window);
      test::write_tiny_dense(from, {.family = family->model_type, .window = window});
      const ModelConfig config = read_model_config(from);
      const double dense_loss = Trainer(*load(from)).step(1).loss;
      for (UpcycleConfig recipe : test::preserving_recipes(86))
        for (const Family* mixture : families()) {
          recipe.target.family = mixture->model_type;
          if (!is_mixture(*mixture) || !problems_of(recipe, config).empty()) continue;
          const std::string pair =
              fmt::format("{}_{}_{}", from.filename().string(), mixture->model_type, pairs.size());
          SCOPED_TRACE(pair);
          const double loss = Trainer(*load(made(recipe, from, pair))).step(1).loss;
          EXPECT_NEAR(loss, dense_loss, 1e-5 * dense_loss);
          pairs.insert(fmt::format("{} {} window {}", family->model_type, mixture->model_type, window));
          fs::remove_all(temporary_.path() / pair);
        }
    }
    for (const char* mixture : family->mixtures)
      EXPECT_TRUE(pairs.contains(fmt::format("{} {} window 0", family->model_type, mixture))) << mixture;
  }
  EXPECT_TRUE(pairs.contains("mistral mixtral window 5"));
}

TEST_F(Upcycled, PaddingNeuronsReceiveGradient) {
  const auto session = load(upcycled(1.0));
  Trainer(*session).step(1);
  for (int layer = 0; layer < session->config.num_hidden_layers; ++layer) {
    const StoredParam& down = session->params.at(fmt::format("layers.{}.shared.down_DF", layer));
    for (std::int64_t f = kDenseWidth; f < kSharedWidth; ++f) {
      double gradient = 0, value = 0;
      for (std::int64_t d = 0; d < down.shard.extent[0]; ++d) {
        gradient += std::abs(double(down.grad.as<float>()[d * kSharedWidth + f]));
        value += std::abs(double(down.value.as<float>()[d * kSharedWidth + f]));
      }
      EXPECT_GT(gradient, 0) << "layer " << layer << ", padding neuron " << f;
      EXPECT_GT(value, 0) << "zero before the step, moved by it";
    }
  }
}

}  // namespace
}  // namespace upmoe

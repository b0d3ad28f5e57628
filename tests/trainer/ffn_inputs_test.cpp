// Hidden states as feed-forward networks read them, against those that training keeps for its backward.

#include "trainer/ffn_inputs.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "parallel/self_comm.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_moe.h"
#include "tests/support/token_file.h"
#include "tests/support/tolerance.h"

namespace upmoe {
namespace {

constexpr std::int64_t kSeq = 16;

class FfnInputs : public testing::Test {
 protected:
  FfnInputs() {
    std::vector<std::uint32_t> tokens;
    for (std::uint32_t i = 0; i < 5 * kSeq + 1; ++i) tokens.push_back(i * i % 61 + i % 2);
    write_token_file(dir_.path() / "tokens.h5", tokens, {}, 64);
    data_ = std::make_unique<TokenDataset>(
        std::vector<TokenDataset::Source>{{dir_.path() / "tokens.h5", 1.0}}, kSeq, false, 0, 64);
  }
  std::unique_ptr<RankModel> model(bool gradients) const {
    ModelConfig config = test::tiny_moe_config();
    config.mlp_only_layers = {0};  // a dense layer and a mixture
    auto made = std::make_unique<RankModel>(config, MeshSpec{}, *self_, Device{},
                                            RankModel::Options{.gradients = gradients});
    made->params.load(made->memory.exec, [](const ParamSpec& p, const Box& box, TensorView out) {
      ASSERT_EQ(box.elements(), out.elements());
      normal_batch(philox_key(7, p.name), 0, out.elements(), out.as<float>());
      for (std::int64_t i = 0; i < out.elements(); ++i) out.as<float>()[i] *= 0.3f;
    });
    return made;
  }

  test::TemporaryDirectory dir_;
  std::unique_ptr<Communicator> self_ = make_self_communicator();
  std::unique_ptr<TokenDataset> data_;
};

TEST_F(FfnInputs, AreWhatTrainingKeeps) {
  const auto trained = model(true), seen = model(false);
  Arena keep(Device{}, arena_address_space(Device{}), "test");
  std::vector<std::int32_t> tokens(kSeq), targets(kSeq), positions(kSeq);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<std::vector<float>> expected;  // by sequence and layer
  for (int i = 0; i < 3; ++i) {
    data_->read(i, tokens, targets, {}, {});
    MicroBatch batch;
    batch.tokens_T = host_view(tokens.data(), {kSeq});
    batch.targets_T = host_view(targets.data(), {kSeq});
    batch.places.positions_T = host_view(positions.data(), {kSeq});
    batch.places.seq_len = kSeq;
    Transformer::Saved saved;
    trained->chunks.front().forward(trained->memory.exec, batch, {}, 1.0, keep, saved);
    for (const Block::Saved& block : saved.blocks) {
      const float* x = block.normed2_TD.as<float>();
      expected.emplace_back(x, x + block.normed2_TD.elements());
    }
  }
  std::size_t at = 0;
  for_each_ffn_input(*seen, *data_, 3, [&](int layer, ConstTensorView x_TD) {
    ASSERT_LT(at, expected.size());
    EXPECT_EQ(layer, static_cast<int>(at % 2));
    ASSERT_EQ(x_TD.shape, (Shape{kSeq, 64}));
    // The same ops on the same numbers.
    for (std::int64_t i = 0; i < x_TD.elements(); ++i)
      ASSERT_EQ(x_TD.as<float>()[i], expected[at][static_cast<std::size_t>(i)]);
    ++at;
  });
  EXPECT_EQ(at, expected.size());
}

TEST_F(FfnInputs, MeanDirectionsAreTheMeansOfThem) {
  const auto seen = model(false);
  const auto directions = mean_directions(*seen, *data_, 99);  // of five
  std::vector<std::vector<double>> sums(2, std::vector<double>(64, 0.0));
  int sequences = 0;
  for_each_ffn_input(*seen, *data_, 99, [&](int layer, ConstTensorView x_TD) {
    sequences += layer == 0 ? 1 : 0;
    for (std::int64_t i = 0; i < x_TD.elements(); ++i)
      sums[static_cast<std::size_t>(layer)][static_cast<std::size_t>(i % 64)] += x_TD.as<float>()[i];
  });
  EXPECT_EQ(sequences, 5);
  ASSERT_EQ(directions.size(), 2u);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    double length = 0;
    for (const double v : sums[layer]) length += v * v;
    length = std::sqrt(length);
    for (std::size_t d = 0; d < 64; ++d) {  // in double but for the rounding of what is given
      const double expected = sums[layer][d] / length;
      EXPECT_NEAR(directions[layer][d], expected, 1.001 * test::kUnit * std::abs(expected));
    }
  }
}

}  // namespace
}  // namespace upmoe

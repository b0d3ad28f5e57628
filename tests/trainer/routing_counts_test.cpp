// What is counted of a model's choices, against a count without any cleverness over what training's forward keeps.

#include "trainer/routing_counts.h"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "parallel/self_comm.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_moe.h"
#include "tests/support/token_file.h"

namespace upmoe {
namespace {

constexpr std::int64_t kSeq = 20;  // not a multiple of the parts

using Table = std::vector<std::vector<std::int64_t>>;

class Routing : public testing::Test {
 protected:
  Routing() {
    config_.mlp_only_layers = {0};  // a dense layer and two mixtures
    config_.num_hidden_layers = 3;
  }

  std::unique_ptr<TokenDataset> data(const std::string& name, std::uint32_t step) const {
    std::vector<std::uint32_t> tokens;
    for (std::uint32_t i = 0; i < 5 * kSeq + 1; ++i) tokens.push_back((i * i * step + i % 3) % 61);
    write_token_file(dir_.path() / name, tokens, {}, 64);
    return std::make_unique<TokenDataset>(std::vector<TokenDataset::Source>{{dir_.path() / name, 1.0}}, kSeq,
                                          false, 0, 64);
  }

  std::unique_ptr<RankModel> model(bool gradients) const {
    auto made = std::make_unique<RankModel>(config_, MeshSpec{}, *self_, Device{},
                                            RankModel::Options{.gradients = gradients});
    made->params.load(made->memory.exec, [](const ParamSpec& p, const Box&, TensorView out) {
      normal_batch(philox_key(7, p.name), 0, out.elements(), out.as<float>());
      for (std::int64_t i = 0; i < out.elements(); ++i) out.as<float>()[i] *= 0.3f;
    });
    return made;
  }

  // By sequence, block and token: the chosen experts, the likeliest first.
  using Chosen = std::vector<std::vector<std::int32_t>>;
  std::map<std::pair<int, int>, Chosen> chosen(const TokenDataset& data, int sequences) const {
    const auto trained = model(true);
    std::map<std::pair<int, int>, Chosen> found;
    std::vector<std::int32_t> tokens(kSeq), targets(kSeq), positions(kSeq);
    std::iota(positions.begin(), positions.end(), 0);
    for (int i = 0; i < sequences; ++i) {
      Arena keep(Device{}, arena_address_space(Device{}), "test");
      data.read(i, tokens, targets, {}, {});
      MicroBatch batch;
      batch.tokens_T = host_view(tokens.data(), {kSeq});
      batch.targets_T = host_view(targets.data(), {kSeq});
      batch.places.positions_T = host_view(positions.data(), {kSeq});
      batch.places.seq_len = kSeq;
      Transformer::Saved saved;
      trained->chunks.front().forward(trained->memory.exec, batch, {}, 1.0, keep, saved);
      for (int block = 1; block < 3; ++block) {
        const auto& of = std::get<MoeLayer::Saved>(saved.blocks[static_cast<std::size_t>(block)].ffn);
        const ConstTensorView index_TK = of.router.index_TK;
        for (std::int64_t t = 0; t < kSeq; ++t)
          found[{i, block}].emplace_back(index_TK.as<std::int32_t>() + t * 2,
                                         index_TK.as<std::int32_t>() + t * 2 + 2);
      }
    }
    return found;
  }

  std::vector<std::int32_t> tokens_of(const TokenDataset& data, int sequence) const {
    std::vector<std::int32_t> tokens(kSeq), targets(kSeq);
    data.read(sequence, tokens, targets, {}, {});
    return tokens;
  }

  test::TemporaryDirectory dir_;
  ModelConfig config_ = test::tiny_moe_config();
  std::unique_ptr<Communicator> self_ = make_self_communicator();
};

TEST_F(Routing, CountsAreThoseOfANaiveCount) {
  const std::vector<std::unique_ptr<TokenDataset>> sources = [&] {
    std::vector<std::unique_ptr<TokenDataset>> made;
    made.push_back(data("a.h5", 1));
    made.push_back(data("b.h5", 7));
    return made;
  }();
  constexpr int kSequences = 3;  // in micro-batches of two: the last one is smaller
  TokenClasses classes{{"even", "odd", "none"}, {}, "hand"};
  for (int token = 0; token < 64; ++token) classes.of_token.push_back(token % 2);
  RoutingCounts counts(config_, classes, kSeq);
  const auto seen = model(false);
  counts.add_source("a", *seen, *sources[0], {.sequences = kSequences, .micro_batch = 2});
  counts.add_source("b", *seen, *sources[1], {.sequences = kSequences, .micro_batch = 2});

  ASSERT_EQ(counts.mixtures().size(), 2u);
  for (std::size_t m = 0; m < 2; ++m) {
    const MixtureCounts& found = counts.mixtures()[m];
    ASSERT_EQ(found.block, static_cast<int>(m) + 1);
    Table by_source(2, std::vector<std::int64_t>(4, 0)), first = by_source;
    Table by_position(8, std::vector<std::int64_t>(4, 0)), by_class(3, std::vector<std::int64_t>(4, 0));
    for (std::size_t s = 0; s < 2; ++s) {
      std::int64_t pairs = 0, same = 0;
      double overlap = 0;
      const auto choices = chosen(*sources[s], kSequences);
      for (int i = 0; i < kSequences; ++i) {
        const Chosen& of = choices.at({i, found.block});
        const std::vector<std::int32_t> tokens = tokens_of(*sources[s], i);
        for (std::size_t t = 0; t < static_cast<std::size_t>(kSeq); ++t) {
          for (const std::int32_t expert : of[t]) {
            const auto e = static_cast<std::size_t>(expert);
            ++by_source[s][e];
            ++by_class[static_cast<std::size_t>(tokens[t] % 2)][e];
            ++by_position[t * 8 / static_cast<std::size_t>(kSeq)][e];
          }
          ++first[s][static_cast<std::size_t>(of[t][0])];
          if (t == 0) continue;
          ++pairs;
          same += of[t][0] == of[t - 1][0] ? 1 : 0;
          for (const std::int32_t expert : of[t])
            for (const std::int32_t other : of[t - 1]) overlap += expert == other ? 0.5 : 0;
        }
      }
      EXPECT_EQ(found.pairs[s], pairs);
      EXPECT_EQ(found.pairs[s], kSequences * (kSeq - 1));
      EXPECT_EQ(found.same_first[s], same);
      EXPECT_DOUBLE_EQ(found.overlap[s], overlap);
    }
    EXPECT_EQ(found.by_source, by_source);
    EXPECT_EQ(found.first_by_source, first);
    EXPECT_EQ(found.by_position, by_position);
    EXPECT_EQ(found.by_class, by_class);
  }
}

TEST_F(Routing, TheLossIsThatOfAnEvaluationAndTheObjectHasAll) {
  const auto tokens = data("a.h5", 3);
  RoutingCounts counts(config_, frequency_bands(std::vector<std::int64_t>(64, 1)), kSeq);
  const auto seen = model(false);
  const EvalOptions options{.sequences = 4, .micro_batch = 3, .begin = 1};
  counts.add_source("a", *seen, *tokens, options);
  EXPECT_EQ(counts.sources()[0].loss, evaluate(*seen, *tokens, options).loss);
  EXPECT_EQ(counts.sources()[0].tokens, 4 * kSeq);
  EXPECT_EQ(counts.sources()[0].sequences, 4);
  const auto object = nlohmann::json::parse(counts.as_json("m"));
  ASSERT_EQ(object["layers"].size(), 2u);
  EXPECT_EQ(object["layers"][1]["layer"], 2);
  EXPECT_EQ(object["layers"][0]["by_source"].get<Table>(), counts.mixtures()[0].by_source);
  EXPECT_EQ(object["positions"].size(), 8u);
  EXPECT_EQ(object["positions"][0]["first"], 0);
  EXPECT_EQ(object["positions"][7]["last"], kSeq - 1);
  std::int64_t placed = 0, classed = 0;
  for (const auto& part : object["positions"]) {
    EXPECT_EQ(part["tokens"].get<std::int64_t>(),
              4 * (part["last"].get<std::int64_t>() - part["first"].get<std::int64_t>() + 1));
    placed += part["tokens"].get<std::int64_t>();
  }
  for (const auto& one : object["classes"]) classed += one["tokens"].get<std::int64_t>();
  EXPECT_EQ(placed, 4 * kSeq);
  EXPECT_EQ(classed, 4 * kSeq);
  EXPECT_NE(counts.summary().find("a: 80 tokens"), std::string::npos) << counts.summary();
}

// Slots of -1 are none, and the first choice is the weightiest.
TEST_F(Routing, ExpertsThatChooseTokens) {
  config_.router.kind = RouterKind::kExpertChoice;
  config_.router.group_size = 2;
  const auto tokens = data("a.h5", 3);
  RoutingCounts counts(config_, frequency_bands(std::vector<std::int64_t>(64, 1)), kSeq);
  const auto seen = model(false);
  const EvalOptions options{.sequences = 4, .micro_batch = 4};
  counts.add_source("a", *seen, *tokens, options);
  std::map<int, std::vector<std::int64_t>> weightiest;
  evaluate(*seen, *tokens, options, {}, [&](ConstTensorView, int block, const Choices& choices) {
    std::vector<std::int64_t>& of = weightiest[block];
    of.resize(4);
    const auto* index = choices.index_TK.as<std::int32_t>();
    const auto* weight = choices.weight_TK.as<float>();
    for (std::int64_t t = 0; t < choices.index_TK.rows(); ++t) {
      std::int64_t best = -1;
      for (std::int64_t slot = t * 4; slot < t * 4 + 4; ++slot)
        if (index[slot] >= 0 && (best < 0 || weight[slot] > weight[best])) best = slot;
      if (best >= 0) ++of[static_cast<std::size_t>(index[best])];
    }
  });
  for (const MixtureCounts& m : counts.mixtures()) {
    EXPECT_EQ(m.first_by_source[0], weightiest.at(m.block));
    // Every expert takes as many tokens of each group.
    for (const std::int64_t taken : m.by_source[0]) EXPECT_EQ(taken, m.by_source[0][0]);
    EXPECT_GT(m.by_source[0][0], 0);
    const auto& first = m.first_by_source[0];
    EXPECT_LE(std::accumulate(first.begin(), first.end(), std::int64_t{0}), 4 * kSeq);
    EXPECT_LE(m.overlap[0], static_cast<double>(m.pairs[0]));
  }
}

TEST_F(Routing, ModelsWhoseTokensChooseNothingAreRefused) {
  const auto refused = [&] {
    try {
      RoutingCounts(config_, frequency_bands({1}), kSeq);
      return std::string();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      return std::string(e.what());
    }
  };
  EXPECT_EQ(refused(), "");
  config_.router.kind = RouterKind::kMixtureOfTokens;
  EXPECT_NE(refused().find("no token chooses"), std::string::npos);
  config_.mlp_only_layers = {0, 1, 2};
  EXPECT_NE(refused().find("no experts"), std::string::npos);
}

// Two experts of four for each of 6 tokens: chances 4/6, 4/6, 3/6, 1/6; first choices 3, 2, 1, 0.
TEST(RoutingRepeats, ChanceIsWhatLoadsGive) {
  MixtureCounts m;
  m.by_source = {{4, 4, 3, 1}};
  m.first_by_source = {{3, 2, 1, 0}};
  m.pairs = {5};
  m.same_first = {2};
  m.overlap = {2.5};
  const Repeats r = repeats_of(m, 0);
  EXPECT_DOUBLE_EQ(r.first, 0.4);
  EXPECT_DOUBLE_EQ(r.overlap, 0.5);
  EXPECT_NEAR(r.first_by_chance, (9.0 + 4 + 1) / 36, 1e-12);
  EXPECT_NEAR(r.overlap_by_chance, (16.0 + 16 + 9 + 1) / 36 / 2, 1e-12);
  m.pairs = {0};
  EXPECT_EQ(repeats_of(m, 0).overlap_by_chance, 0);
}

TEST(RoutingInformation, BitsOfKnownTables) {
  EXPECT_DOUBLE_EQ(information_bits({{5, 0}, {0, 5}}), 1.0);          // the group is the expert
  EXPECT_NEAR(information_bits({{2, 4, 6}, {3, 6, 9}}), 0.0, 1e-12);  // it says nothing
  EXPECT_DOUBLE_EQ(information_bits({{3, 0, 0, 0}, {0, 3, 0, 0}, {0, 0, 3, 0}, {0, 0, 0, 3}}), 2.0);
  EXPECT_EQ(information_bits({{0, 0}, {0, 0}}), 0.0);
}

TEST(RoutingBands, AreSharesOfTheText) {
  // 10, 4, 3, 2 and 1 of 20: the first is half of the text, the next two bring it to 17 of 20.
  const TokenClasses bands = frequency_bands({3, 10, 1, 4, 2});
  EXPECT_EQ(bands.of_token, (std::vector<int>{1, 0, 3, 1, 2}));
  EXPECT_EQ(bands.names.size(), 4u);
}

}  // namespace
}  // namespace upmoe

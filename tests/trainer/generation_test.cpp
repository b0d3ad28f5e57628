// Generation against forward passes without a cache, against transformers' own, alone and beside others, on one rank
// and on several.

#include "trainer/generation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/ops/pointwise.h"
#include "parallel/thread_comm.h"
#include "tests/support/golden_speaker.h"
#include "tests/support/tolerance.h"
#include "trainer/evaluation.h"

namespace upmoe {
namespace {

using test::drawn_tokens;
using test::Golden;
using test::whole_logits;
using Tokens = std::vector<std::int32_t>;

using Model = test::GoldenSpeaker;

// New tokens of every prompt and the logits that each was taken from.
struct Spoken {
  std::vector<Tokens> tokens;
  std::vector<std::vector<std::vector<float>>> logits;
};

Spoken speak(RankModel& model, const std::vector<Prompt>& prompts, const GenerationOptions& options) {
  Spoken spoken;
  spoken.logits.resize(prompts.size());
  spoken.tokens = generate(model, prompts, options, [&](std::size_t i, std::int32_t, auto logits_V) {
                    spoken.logits[i].emplace_back(logits_V.begin(), logits_V.end());
                  }).tokens;
  return spoken;
}

// How far a logit of a token may lie from the same one computed another way: with a cache, in other chunks, on other
// ranks. Behind the logits of the deepest of these models (six blocks, 32 wide) stand sums of some 1500 terms in all,
// one behind the other, each way with roundings of its own: sqrt(2 * 1500 / 6) units, where partial sums grow as those
// of a random walk. Of ten thousand logits one lies five of these away, which are 110; up to 40 are seen. In units of
// the largest, where that is above 1.
double bound_of(const float* logits_V, std::int64_t vocab) {
  return 110 * test::kUnit * std::max(1.0f, std::abs(*std::max_element(logits_V, logits_V + vocab)));
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A pretended GPU is slow: fewer sizes, of chunks that are attended to by tiles and of such as are too short for them.
Tokens chunks(const Tokens& of_cpu, const Tokens& of_gpu) {
  return test::on_gpu() ? of_gpu : of_cpu;
}

class EveryModel : public testing::TestWithParam<std::string> {};

// What is made with a cache is what a pass over the whole sequence says, and its first largest logit. The prompt goes
// in at once, and in chunks that do not divide it; the windows of models that have one are passed several times.
TEST_P(EveryModel, CacheEqualsTheWholeForward) {
  Model m(GetParam());
  const std::int64_t V = m.golden.config().vocab_size;
  for (const std::int64_t chunk : chunks({2048, 4, 1}, {2048, 4})) {
    const Prompt prompt{drawn_tokens(5, 11, V), 0};
    const Spoken spoken = speak(m.on_rank, {prompt}, {.max_new_tokens = 30, .chunk = chunk});
    ASSERT_EQ(spoken.tokens[0].size(), 30u);
    Tokens all = prompt.tokens;
    all.insert(all.end(), spoken.tokens[0].begin(), spoken.tokens[0].end());
    const std::vector<float> expected = whole_logits(m.on_rank, all);
    for (std::size_t i = 0; i < 30; ++i) {
      const float* of_token = expected.data() + (prompt.tokens.size() - 1 + i) * static_cast<std::size_t>(V);
      const double bound = bound_of(of_token, V);
      for (std::size_t v = 0; v < static_cast<std::size_t>(V); ++v)
        ASSERT_NEAR(spoken.logits[0][i][v], of_token[v], bound) << "token " << i << ", logit " << v;
      EXPECT_GE(of_token[spoken.tokens[0][i]] + bound, *std::max_element(of_token, of_token + V));
    }
  }
}

// Later chunks of a prompt are computed by blocks, where they are long enough.
TEST_P(EveryModel, LaterChunksEqualTheWholeForward) {
  Model m(GetParam());
  const std::int64_t V = m.vocab();
  const Prompt prompt{drawn_tokens(7, 60, V), 0};
  for (const std::int64_t chunk : chunks({17, 24, 59}, {17, 59})) {
    const Spoken spoken = speak(m.on_rank, {prompt}, {.max_new_tokens = 3, .chunk = chunk});
    Tokens all = prompt.tokens;
    all.insert(all.end(), spoken.tokens[0].begin(), spoken.tokens[0].end());
    const std::vector<float> expected = whole_logits(m.on_rank, all);
    for (std::size_t i = 0; i < 3; ++i) {
      const float* of_token = expected.data() + (prompt.tokens.size() - 1 + i) * static_cast<std::size_t>(V);
      const double bound = bound_of(of_token, V);
      for (std::size_t v = 0; v < static_cast<std::size_t>(V); ++v)
        ASSERT_NEAR(spoken.logits[0][i][v], of_token[v], bound)
            << "chunks of " << chunk << ", token " << i << ", logit " << v;
    }
  }
}

// Memory that others have used, and left without numbers, is as good as new.
TEST_P(EveryModel, MemoryIsUsedAgain) {
  Model m(GetParam());
  const std::vector<Prompt> prompts{{drawn_tokens(5, 11, m.vocab()), 0}, {drawn_tokens(6, 40, m.vocab()), 1}};
  const GenerationOptions options{.max_new_tokens = 6, .chunk = 17};
  const std::vector<Tokens> expected = generate(m.on_rank, prompts, options).tokens;
  Exec& ex = m.on_rank.memory.exec;
  Arena keep(ex.device, arena_address_space(ex.device), "keys, values and activations");
  const std::size_t used = keep.mark();
  ops::fill(ex, keep.take({1 << 20}, DType::kF32, "nothing"), std::numeric_limits<float>::quiet_NaN());
  keep.rewind(used);
  for (int again = 0; again < 2; ++again) {
    const Generated made = generate(m.on_rank, keep, prompts, options);
    EXPECT_EQ(made.tokens, expected);
    EXPECT_EQ(keep.used(), 0u);
    EXPECT_LT(made.memory.keys + made.memory.work, std::size_t{4} << 20) << "not of what others took";
  }
}

// One pass over the whole sequence for every token, as who has no cache would do it.
TEST_P(EveryModel, GreedyEqualsRepeatedForwards) {
  Model m(GetParam());
  const std::int64_t V = m.golden.config().vocab_size;
  const Prompt prompt{drawn_tokens(6, 3, V), 0};
  const Tokens made = generate(m.on_rank, std::vector{prompt}, {.max_new_tokens = 12}).tokens[0];
  Tokens all = prompt.tokens, expected;
  for (int i = 0; i < 12; ++i) {
    const std::vector<float> logits = whole_logits(m.on_rank, all);
    const auto last = logits.end() - V;
    expected.push_back(static_cast<std::int32_t>(std::max_element(last, logits.end()) - last));
    all.push_back(expected.back());
  }
  EXPECT_EQ(made, expected);
}

// The tokens of transformers' generate(do_sample=False), computed in fp64 (tests/golden/README.md).
TEST_P(EveryModel, GreedyEqualsTransformers) {
  const std::filesystem::path path = Golden::folder() / "generated.json";
  std::ifstream file(path);
  ASSERT_TRUE(file) << path << " is missing: launch/make_golden_generation.py writes it";
  const nlohmann::json cases = nlohmann::json::parse(file);
  ASSERT_TRUE(cases.contains(GetParam()));
  const nlohmann::json& one = cases[GetParam()];
  const auto expected = one["tokens"].get<Tokens>();
  ASSERT_EQ(expected.size(), 64u);
  ASSERT_GE(std::set<std::int32_t>(expected.begin(), expected.end()).size(), 6u)
      << "would do without positions";
  Model m(GetParam(), DType::kF32, one.value("layers_times", 1.0f));
  const std::vector<Prompt> prompts{{one["prompt"].get<Tokens>(), 0}};
  for (const std::int64_t chunk : chunks({2048, 5}, {5}))
    EXPECT_EQ(generate(m.on_rank, prompts, {.max_new_tokens = 64, .chunk = chunk}).tokens[0], expected);
}

INSTANTIATE_TEST_SUITE_P(Cases, EveryModel, testing::ValuesIn(test::golden_cases()),
                         [](const auto& i) { return i.param; });

// Rows of different lengths, with ends of their own.
std::vector<Prompt> company(std::int64_t vocab) {
  std::vector<Prompt> prompts;
  for (const std::int64_t length : {9, 1, 23, 4, 16}) {
    const auto row = static_cast<std::int64_t>(prompts.size());
    prompts.push_back({drawn_tokens(20 + static_cast<std::uint64_t>(row), length, vocab), row});
  }
  return prompts;
}

class OneRow : public testing::TestWithParam<std::tuple<std::string, DType>> {};

TEST_P(OneRow, IsTheSameBesideAnyOthers) {
  const auto& [name, dtype] = GetParam();
  if (test::on_gpu()) GTEST_SKIP() << "not said of a GPU's library";
  Model m(name, dtype);
  const std::int64_t V = m.golden.config().vocab_size;
  const std::vector<Prompt> all = company(V);
  for (const double temperature : {0.0, 1.0}) {
    const GenerationOptions options{.max_new_tokens = 20,
                                    .stop = drawn_tokens(9, 3, V),
                                    .sampling = {.temperature = temperature, .top_p = 0.9},
                                    .chunk = 7};
    const Spoken together = speak(m.on_rank, all, options);
    std::vector<Prompt> turned(all.rbegin(), all.rend());
    const Spoken other_way = speak(m.on_rank, turned, options);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const Spoken alone = speak(m.on_rank, {all[i]}, options);
      for (const auto& [beside, at] : {std::pair{&together, i}, {&other_way, all.size() - 1 - i}}) {
        EXPECT_EQ(beside->tokens[at], alone.tokens[0]) << "row " << i;
        ASSERT_EQ(beside->logits[at].size(), alone.logits[0].size());
        for (std::size_t n = 0; n < alone.logits[0].size(); ++n)
          EXPECT_TRUE(same_bits(beside->logits[at][n], alone.logits[0][n])) << "row " << i << ", token " << n;
      }
    }
  }
}

TEST_P(OneRow, OfALongPromptIsTheSameBesideAnyOthers) {
  const auto& [name, dtype] = GetParam();
  if (test::on_gpu()) GTEST_SKIP() << "not said of a GPU's library";
  Model m(name, dtype);
  const std::vector<Prompt> all{{drawn_tokens(31, 50, m.vocab()), 0},
                                {drawn_tokens(32, 9, m.vocab()), 1},
                                {drawn_tokens(33, 41, m.vocab()), 2}};
  const GenerationOptions options{.max_new_tokens = 8, .chunk = 17};
  const Spoken together = speak(m.on_rank, all, options);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Spoken alone = speak(m.on_rank, {all[i]}, options);
    ASSERT_EQ(together.tokens[i], alone.tokens[0]) << "row " << i;
    for (std::size_t n = 0; n < alone.logits[0].size(); ++n)
      EXPECT_TRUE(same_bits(together.logits[i][n], alone.logits[0][n])) << "row " << i << ", token " << n;
  }
}

// Rows that wait for others get the bits that they have beside them, in places of the cache that others have left.
TEST_P(OneRow, IsTheSameInAnyWave) {
  const auto& [name, dtype] = GetParam();
  if (test::on_gpu()) GTEST_SKIP() << "not said of a GPU's library";
  Model m(name, dtype);
  const std::vector<Prompt> all = company(m.vocab());
  GenerationOptions options{.max_new_tokens = 20,
                            .stop = drawn_tokens(9, 3, m.vocab()),
                            .sampling = {.temperature = 1.0},
                            .chunk = 7};
  const Spoken together = speak(m.on_rank, all, options);
  for (const std::int64_t rows : {1, 2, 3, 5, 100}) {
    options.rows = rows;
    const Spoken waves = speak(m.on_rank, all, options);
    EXPECT_EQ(waves.tokens, together.tokens) << rows;
    for (std::size_t i = 0; i < all.size(); ++i) {
      ASSERT_EQ(waves.logits[i].size(), together.logits[i].size());
      for (std::size_t n = 0; n < waves.logits[i].size(); ++n)
        EXPECT_TRUE(same_bits(waves.logits[i][n], together.logits[i][n]))
            << rows << " at once, row " << i << ", token " << n;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, OneRow,
                         testing::Combine(testing::Values("moe_a27b", "mistral", "dbrx", "gemma"),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& i) {
                           return std::get<0>(i.param) + "_" + name_of(std::get<1>(i.param));
                         });

struct Ranks {
  std::string model;
  int ranks, tp;
};
class ManyRanks : public testing::TestWithParam<Ranks> {};

TEST_P(ManyRanks, SayWhatOneSays) {
  const auto& [name, ranks, tp] = GetParam();
  Model one(name);
  const std::vector<Prompt> prompts = company(one.golden.config().vocab_size);
  const GenerationOptions options{.max_new_tokens = 16, .stop = {3, 5}, .chunk = 10};
  // The last one of 21, or 22 with tp.
  const std::vector<Prompt> of_chunks{{drawn_tokens(8, 61, one.vocab()), 0}};
  const std::vector<Tokens> expected_of_chunks =
      generate(one.on_rank, of_chunks, {.max_new_tokens = 3, .chunk = 40}).tokens;
  const Spoken expected = speak(one.on_rank, prompts, options);
  std::mutex mutex;
  run_in_threads(ranks, [&, tp = tp](Communicator& world) {
    const Golden& golden = one.golden;
    RankModel model(golden.config(), generation_mesh(golden.config(), world.size(), tp), world, Device{},
                    {.gradients = false});
    model.params.load(model.memory.exec, test::golden_weights(golden));
    const Spoken spoken = speak(model, prompts, options);
    GenerationOptions one_by_one = options;
    one_by_one.rows = 1;
    const std::vector<Tokens> in_waves = generate(model, prompts, one_by_one).tokens;
    const std::vector<Tokens> by_chunks =
        generate(model, of_chunks, {.max_new_tokens = 3, .chunk = 40}).tokens;
    const std::lock_guard lock(mutex);
    EXPECT_EQ(by_chunks, expected_of_chunks) << "rank " << world.rank();
    EXPECT_EQ(spoken.tokens, expected.tokens) << "rank " << world.rank();
    EXPECT_EQ(in_waves, expected.tokens) << "rank " << world.rank();
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const bool mine = model.mesh.coord(Axis::kTp) == 0 &&
                        static_cast<int>(i) % model.mesh.spec().dp == model.mesh.coord(Axis::kDp);
      ASSERT_EQ(spoken.logits[i].size(), mine ? expected.tokens[i].size() : 0u) << "prompt " << i;
      for (std::size_t n = 0; n < spoken.logits[i].size(); ++n) {
        const double bound = bound_of(expected.logits[i][n].data(), one.vocab());
        for (std::size_t v = 0; v < spoken.logits[i][n].size(); ++v)
          ASSERT_NEAR(spoken.logits[i][n][v], expected.logits[i][n][v], bound);
      }
    }
  });
}

// On the ranks of one mesh too, where other ranks' rows come to the same experts: a row has the same bits beside any
// others, in any place of the file, as alone, when all ranks but its own have nothing.
TEST_P(ManyRanks, ARowIsTheSameBesideAnyOthers) {
  const auto& [name, ranks, tp] = GetParam();
  if (test::on_gpu()) GTEST_SKIP() << "not said of a GPU's library";
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Golden golden(name);
    const std::vector<Prompt> all = company(golden.config().vocab_size);
    const std::vector<Prompt> turned(all.rbegin(), all.rend());
    const GenerationOptions options{.max_new_tokens = 12, .chunk = 7};
    std::vector<std::vector<std::vector<float>>> together(all.size()), other_way(all.size()),
        alone(all.size());
    std::mutex mutex;
    run_in_threads(ranks, [&, tp = tp](Communicator& world) {
      RankModel model(golden.config(), generation_mesh(golden.config(), world.size(), tp), world, Device{},
                      {.dtype = dtype, .gradients = false});
      model.params.load(model.memory.exec, test::golden_weights(golden));
      // Each row's logits, on the rank that has it; `place` is the row that a prompt of `prompts` is.
      const auto say = [&](const std::vector<Prompt>& prompts, auto& into, const auto& place) {
        const Spoken spoken = speak(model, prompts, options);
        const std::lock_guard lock(mutex);
        for (std::size_t i = 0; i < prompts.size(); ++i)
          if (!spoken.logits[i].empty()) into[place(i)] = spoken.logits[i];
      };
      say(all, together, [](std::size_t i) { return i; });
      say(turned, other_way, [&](std::size_t i) { return all.size() - 1 - i; });
      for (std::size_t r = 0; r < all.size(); ++r) say({all[r]}, alone, [r](std::size_t) { return r; });
    });
    for (std::size_t r = 0; r < all.size(); ++r)
      for (const auto* beside : {&together, &other_way}) {
        ASSERT_EQ((*beside)[r].size(), 12u);
        ASSERT_EQ(alone[r].size(), 12u);
        for (std::size_t n = 0; n < 12; ++n)
          EXPECT_TRUE(same_bits((*beside)[r][n], alone[r][n]))
              << name_of(dtype) << ", row " << r << ", token " << n;
      }
  }
}

// moe_odd has a vocabulary that two ranks do not halve, six ranks are more than the rows, mistral a window.
INSTANTIATE_TEST_SUITE_P(Meshes, ManyRanks,
                         testing::Values(Ranks{"moe_a27b", 2, 1}, Ranks{"moe_a27b", 2, 2},
                                         Ranks{"moe_a27b", 4, 2}, Ranks{"moe_a27b", 6, 1},
                                         Ranks{"moe_odd", 3, 3}, Ranks{"mistral", 2, 2}, Ranks{"gemma", 2, 2},
                                         Ranks{"dots1", 2, 1}, Ranks{"dbrx", 2, 2}, Ranks{"dense", 3, 1}),
                         [](const auto& i) {
                           return fmt::format("{}_{}_tp{}", i.param.model, i.param.ranks, i.param.tp);
                         });

TEST(GenerationEnds, BehindAStopToken) {
  Model m("llama");
  const std::int64_t V = m.golden.config().vocab_size;
  const std::vector<Prompt> prompts = company(V);
  const std::vector<Tokens> free = generate(m.on_rank, prompts, {.max_new_tokens = 20}).tokens;
  const std::int32_t stop = free[2][7];
  const std::vector<Tokens> stopped =
      generate(m.on_rank, prompts, {.max_new_tokens = 20, .stop = {stop}}).tokens;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto end = std::find(free[i].begin(), free[i].end(), stop);
    EXPECT_EQ(stopped[i], Tokens(free[i].begin(), end == free[i].end() ? end : end + 1)) << "row " << i;
  }
}

TEST(GenerationEnds, AtOnceWhereNothingIsAsked) {
  Model m("dense");
  EXPECT_TRUE(generate(m.on_rank, {}, {}).tokens.empty());
  const std::vector<Prompt> one{{{1, 2}, 0}};
  EXPECT_EQ(generate(m.on_rank, one, {.max_new_tokens = 0}).tokens, std::vector<Tokens>{{}});
  const Generated g = generate(m.on_rank, one, {.max_new_tokens = 1});
  EXPECT_EQ(g.tokens[0].size(), 1u);
  EXPECT_EQ(g.prompt_tokens, 2);
  EXPECT_EQ(g.new_tokens, 1);
  EXPECT_GT(g.tokens_per_s(), 0);
}

TEST(GenerationRefuses, WhatItCannotGoOnFrom) {
  Model m("moe_a27b");
  const auto refused = [&](const Tokens& tokens, const char* words) {
    try {
      generate(m.on_rank, std::vector<Prompt>{{{1}, 0}, {tokens, 1}}, {});
      FAIL() << "not refused: " << words;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_THAT(e.what(), testing::HasSubstr(words));
    }
  };
  refused({}, "prompt 1 has no tokens");
  refused({5, 128}, "token 128 is none of the model's 128 tokens");
  refused({-1}, "token -1 is none");
  refused(Tokens(65, 1), "65 tokens, and the model positions for 64");
  ModelConfig config = m.golden.config();
  config.router.kind = RouterKind::kExpertChoice;
  EXPECT_THAT(refusal_of(config, {}), testing::HasSubstr("expert_choice cannot generate"));
  EXPECT_THROW(generation_mesh(config, 4, 3), Error) << "ranks";
  EXPECT_THROW(generation_mesh(config, 8, 8), Error) << "heads";
  EXPECT_EQ(generation_mesh(config, 4, 2).str(), MeshSpec({.dp = 2, .tp = 2, .ep = 4}).str());
}

}  // namespace
}  // namespace upmoe

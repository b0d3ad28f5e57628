// What is timed, in which order, and what is made of it; with times that a test says.

#include "trainer/generation_rates.h"

#include <gtest/gtest.h>

#include "tests/support/golden_speaker.h"

namespace upmoe {
namespace {

TEST(Quantile, IsOfTheValues) {
  EXPECT_EQ(quantile({}, 0.5), 0);
  EXPECT_EQ(quantile({7}, 0.95), 7);
  EXPECT_EQ(quantile({3, 1, 2}, 0.5), 2);
  EXPECT_EQ(quantile({4, 3, 1, 2}, 0.5), 2);
  std::vector<double> hundred;
  for (int i = 100; i > 0; --i) hundred.push_back(i);
  EXPECT_EQ(quantile(hundred, 0.95), 95);
  EXPECT_EQ(quantile(hundred, 0), 1);
  EXPECT_EQ(quantile(hundred, 1), 100);
}

struct Call {
  std::size_t model, rows;
  std::int64_t longest, shortest, output;
  friend bool operator==(const Call&, const Call&) = default;
};
std::ostream& operator<<(std::ostream& out, const Call& c) {
  return out << fmt::format("model {}, {} rows, {} to {} tokens, {} new", c.model, c.rows, c.shortest,
                            c.longest, c.output);
}

// A round's times are those of `seconds`, the slow one where it is cold.
TEST(GenerationRates, ModelsTakeTurnsAndMediansAreTaken) {
  const RatesRequest request{.prompt = 10, .output = 6, .rounds = 3};
  std::vector<Call> calls;
  std::map<std::pair<std::size_t, std::size_t>, int> timed;
  const double of_round[] = {5, 1, 2};
  const auto speak = [&](std::size_t m, std::span<const Prompt> prompts, const GenerationOptions& options) {
    Call call{m, prompts.size(), 0, 100, options.max_new_tokens};
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const auto n = static_cast<std::int64_t>(prompts[i].tokens.size());
      call.longest = std::max(call.longest, n);
      call.shortest = std::min(call.shortest, n);
      EXPECT_EQ(prompts[i].row, static_cast<std::int64_t>(i));
      for (const std::int32_t token : prompts[i].tokens) EXPECT_LT(token, m == 0 ? 7 : 1000);
    }
    EXPECT_TRUE(options.stop.empty());
    EXPECT_EQ(options.sampling.temperature, 0);
    calls.push_back(call);
    Generated g;
    if (options.max_new_tokens != request.output) {  // cold
      g.prefill_seconds = g.decode_seconds = 1000;
      g.step_seconds = {1000, 1000};
      g.memory.keys = 1;
      return g;
    }
    const int round = timed[{m, prompts.size()}]++;
    const double of_model = m == 0 ? 1 : 10;
    g.prefill_seconds = of_model * of_round[round];
    g.decode_seconds = of_model * of_round[round] * 100;
    g.step_seconds = std::vector<double>(5, of_model * (round == 0 ? 0.5 : 0.25));
    g.memory = {m + 1, static_cast<std::size_t>(round) + 7, 0, static_cast<std::int64_t>(prompts.size())};
    return g;
  };
  const std::vector<std::int64_t> concurrency{1, 3};
  const ModelToTime models[] = {{7, {3, 1}}, {1000, concurrency}};
  const auto rates = measure_rates(models, request, speak);

  std::vector<Call> expected;
  for (int round = 0; round < 3; ++round)
    for (const std::size_t rows : {1u, 3u})
      for (const std::size_t m : {0u, 1u}) {
        if (round == 0) expected.push_back({m, rows, 10, rows == 1 ? 10 : 1, 3});
        expected.push_back({m, rows, 10, 10, 6});
      }
  EXPECT_EQ(calls, expected);
  ASSERT_EQ(rates.size(), 2u);
  for (std::size_t m = 0; m < 2; ++m) {
    ASSERT_EQ(rates[m].size(), 2u);
    for (std::size_t c = 0; c < 2; ++c) {
      const GenerationRates& r = rates[m][c];
      const double of_model = m == 0 ? 1 : 10;
      EXPECT_EQ(r.concurrency, concurrency[c]);
      EXPECT_EQ(r.prefill_seconds, of_model * 2);
      EXPECT_EQ(r.decode_seconds, of_model * 200);
      EXPECT_EQ(r.step_seconds, of_model * 0.25);
      EXPECT_EQ(r.slow_step_seconds, of_model * 0.5);
      EXPECT_EQ(r.memory.weights, m + 1);
      EXPECT_EQ(r.memory.keys, 7u) << "of the first round";
      EXPECT_EQ(r.memory.rows, concurrency[c]);
    }
  }
}

// Models need not be timed with the same numbers of requests: each takes its turn where it has them.
TEST(GenerationRates, EachModelHasNumbersOfItsOwn) {
  std::vector<std::pair<std::size_t, std::size_t>> calls;
  const ModelToTime models[] = {{50, {1, 4, 5}}, {50, {1, 4, 16, 20}}};
  const auto rates =
      measure_rates(models, {.prompt = 3, .output = 5, .rounds = 1},
                    [&](std::size_t m, std::span<const Prompt> prompts, const GenerationOptions& options) {
                      Generated g;
                      if (options.max_new_tokens != 5) return g;  // cold
                      calls.emplace_back(m, prompts.size());
                      g.prefill_seconds = static_cast<double>(100 * m + prompts.size());
                      return g;
                    });
  const std::vector<std::pair<std::size_t, std::size_t>> expected{{0, 1}, {1, 1},  {0, 4}, {1, 4},
                                                                  {0, 5}, {1, 16}, {1, 20}};
  EXPECT_EQ(calls, expected);
  ASSERT_EQ(rates.size(), 2u);
  for (std::size_t m = 0; m < 2; ++m) {
    ASSERT_EQ(rates[m].size(), models[m].concurrency.size());
    for (std::size_t c = 0; c < rates[m].size(); ++c) {
      EXPECT_EQ(rates[m][c].concurrency, models[m].concurrency[c]);
      EXPECT_EQ(rates[m][c].prefill_seconds,
                static_cast<double>(100 * m) + static_cast<double>(models[m].concurrency[c]));
    }
  }
}

TEST(Concurrency, IsPowersOfFourAndTheMost) {
  using Numbers = std::vector<std::int64_t>;
  EXPECT_EQ(concurrency_up_to(1), Numbers({1}));
  EXPECT_EQ(concurrency_up_to(3), Numbers({1, 3}));
  EXPECT_EQ(concurrency_up_to(4), Numbers({1, 4}));
  EXPECT_EQ(concurrency_up_to(71), Numbers({1, 4, 16, 64, 71}));
  EXPECT_EQ(concurrency_up_to(256), Numbers({1, 4, 16, 64, 256}));
}

TEST(GenerationRates, TokensOfAPromptAreTheSameInEveryRound) {
  std::vector<std::vector<std::int32_t>> first;
  const ModelToTime models[] = {{50, {2}}};
  measure_rates(models, {.prompt = 8, .output = 5, .rounds = 3},
                [&](std::size_t, std::span<const Prompt> prompts, const GenerationOptions& options) {
                  if (options.max_new_tokens != 5) return Generated{};
                  if (first.empty())
                    for (const Prompt& p : prompts) first.push_back(p.tokens);
                  EXPECT_NE(first[0], first[1]);
                  for (std::size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(prompts[i].tokens, first[i]);
                  return Generated{};
                });
}

TEST(GenerationRates, RefusesARequestWithoutSteps) {
  const ModelToTime models[] = {{50}};
  const auto never = [](std::size_t, std::span<const Prompt>, const GenerationOptions&) {
    return Generated{};
  };
  EXPECT_THROW(measure_rates(models, {.output = 1}, never), Error);
}

// What generation says it holds is what it holds.
TEST(GenerationMemory, IsOfWeightsKeysAndWork) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    test::GoldenSpeaker m("moe_a27b", dtype);
    const ModelConfig& c = m.golden.config();
    const std::vector<Prompt> prompts{{test::drawn_tokens(1, 9, m.vocab()), 0},
                                      {test::drawn_tokens(2, 4, m.vocab()), 1}};
    const Generated g = generate(m.on_rank, prompts, {.max_new_tokens = 8});
    EXPECT_EQ(g.step_seconds.size(), 7u);
    EXPECT_EQ(g.memory.weights, m.on_rank.params.value_bytes());
    EXPECT_EQ(g.memory.rows, 2);
    const std::int64_t slots = 9 + 8 - 1,
                       of_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim;
    const auto keys = static_cast<std::size_t>(2 * slots * of_token) * size_of(dtype);
    EXPECT_GE(g.memory.keys, keys);
    EXPECT_LT(g.memory.keys, keys + static_cast<std::size_t>(64 * 2 * 2 * c.num_hidden_layers));
    EXPECT_GT(g.memory.work, static_cast<std::size_t>(9 * c.hidden_size) * size_of(dtype));
  }
}

}  // namespace
}  // namespace upmoe

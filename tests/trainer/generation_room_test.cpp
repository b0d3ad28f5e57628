#include "trainer/generation_room.h"

#include <gtest/gtest.h>

#include "tests/support/golden_speaker.h"

namespace upmoe {
namespace {

std::vector<Prompt> of_lengths(const std::vector<std::int64_t>& lengths) {
  std::vector<Prompt> prompts;
  for (const std::int64_t n : lengths) prompts.push_back({test::drawn_tokens(1, n, 50), 0});
  return prompts;
}

TEST(Slots, AreOfTheLongestOrOfTheWindow) {
  const std::vector<Prompt> prompts = of_lengths({3, 30, 12});
  const std::size_t some[] = {0, 2}, all[] = {0, 1, 2};
  ModelConfig config;
  const GenerationOptions options{.max_new_tokens = 10, .chunk = 8};
  EXPECT_EQ(slots_of(config, prompts, all, options), 39) << "the last token is not kept";
  EXPECT_EQ(slots_of(config, prompts, some, options), 21);
  EXPECT_EQ(slots_of(config, prompts, {}, options), 1);
  config.sliding_window = 5;
  EXPECT_EQ(slots_of(config, prompts, all, options), 5 + 8 - 1);
  config.sliding_window = 100;
  EXPECT_EQ(slots_of(config, prompts, all, options), 39);
}

// Room for so many rows and a half, whatever the model keeps.
TEST(Rows, AreThoseThatFitBesideTheWeights) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    test::GoldenSpeaker m("moe_a27b", dtype);
    const ModelConfig& c = m.golden.config();
    const std::vector<Prompt> prompts = of_lengths({4, 9});
    const GenerationOptions options{.max_new_tokens = 8};
    const double keys = 16.0 * 2 *
                        static_cast<double>(c.num_hidden_layers * c.num_key_value_heads * c.head_dim) *
                        static_cast<double>(size_of(dtype)),
                 logits = 8.0 * static_cast<double>(c.vocab_size),
                 weights = static_cast<double>(m.on_rank.params.value_bytes());
    for (const int rows : {1, 7, 1000})
      EXPECT_EQ(
          rows_in(m.on_rank, prompts, options, (weights + (rows + 0.5) * (keys + logits)) / kMemoryOfRows),
          rows);
    EXPECT_EQ(rows_in(m.on_rank, prompts, options, weights), 1)
        << "one at least, who finds no memory says so";
  }
}

TEST(Rows, OfACpuAreSixtyFour) {
  test::GoldenSpeaker m("dense");
  const std::int64_t rows = rows_that_fit(m.on_rank, of_lengths({4}), {});
  if (test::on_gpu()) {
    EXPECT_GT(rows, 64) << "a golden model leaves a GPU room for many";
  } else {
    EXPECT_EQ(rows, 64);
  }
}

// The cache is of a wave's rows, not of all.
TEST(Rows, OfACacheAreThoseOfAWave) {
  test::GoldenSpeaker m("dense");
  const std::vector<Prompt> prompts = of_lengths({4, 9, 5, 6, 7});
  GenerationOptions options{.max_new_tokens = 5, .rows = 2};
  const Generated waves = generate(m.on_rank, prompts, options);
  EXPECT_EQ(waves.memory.rows, 2);
  EXPECT_EQ(waves.step_seconds.size(), 3u * 4) << "three waves of four steps";
  options.rows = 0;
  const Generated together = generate(m.on_rank, prompts, options);
  EXPECT_EQ(together.memory.rows, 5);
  EXPECT_EQ(together.step_seconds.size(), 4u);
  EXPECT_LT(waves.memory.keys, together.memory.keys / 2);
  EXPECT_GT(waves.memory.keys, 0u);
  options.rows = 100;
  EXPECT_EQ(generate(m.on_rank, prompts, options).memory.rows, 5) << "no room for rows that are not there";
}

}  // namespace
}  // namespace upmoe

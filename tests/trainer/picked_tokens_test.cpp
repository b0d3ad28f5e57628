// Of the last block's tokens those alone are made whose logits are wanted: they are what a pass that makes all of them
// says, keys and values are those of all tokens, and a rehearsal books what a prompt costs then.

#include <gtest/gtest.h>

#include <cstring>
#include <mutex>

#include "kernels/ops/transfer.h"
#include "parallel/thread_comm.h"
#include "tests/support/golden_speaker.h"
#include "tests/support/tolerance.h"
#include "trainer/placed_vectors.h"
#include "trainer/rehearsal.h"

namespace upmoe {
namespace {

using test::Golden;
using Picks = std::vector<std::int32_t>;

constexpr std::int64_t kTokens = 12;

struct Passed {
  std::vector<float> logits;          // of the picked tokens
  std::vector<std::byte> last_block;  // its keys and values
};

std::vector<std::byte> on_host(Exec& ex, const TensorView& view) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(view.elements()) * size_of(view.dtype));
  ops::download(ex, {bytes.data(), view.shape, view.dtype, Device{}}, view);
  return bytes;
}

// One sequence from its first token on.
Passed pass(RankModel& model, const Picks& picks) {
  Exec& ex = model.memory.exec;
  const Transformer& transformer = model.chunks.front();
  Arena keep(ex.device, arena_address_space(ex.device), "keys, values and activations");
  const KeyCaches caches(keep, transformer.attention_of_blocks(), 1, kTokens, transformer.dtype);
  std::vector<std::int32_t> tokens = test::drawn_tokens(9, kTokens, model.config.vocab_size), rows(kTokens),
                            positions;
  for (std::int32_t t = 0; t < kTokens; ++t) positions.push_back(t);
  MicroBatch batch;
  ConstTensorView rows_T, pick_N;
  PlacedVectors placed;
  const PlacedVectors::Part parts[] = {
      {tokens, batch.tokens_T}, {rows, rows_T}, {positions, batch.places.positions_T}, {picks, pick_N}};
  placed.place(ex, parts);
  batch.targets_T = batch.tokens_T;
  batch.places.seq_len = kTokens;
  const CachedTokens cached{rows_T, batch.places.positions_T, kTokens * (kTokens + 1) / 2, kTokens};
  const TensorView logits_NV = transformer.logits(ex, batch, {caches, cached, true, pick_N}, keep);
  Passed passed;
  passed.logits.resize(picks.size() * static_cast<std::size_t>(model.config.vocab_size));
  if (!picks.empty()) ops::download(ex, host_view(passed.logits.data(), logits_NV.shape), logits_NV);
  const KeyCache& last = caches.of(transformer.blocks.size() - 1);
  passed.last_block = on_host(ex, last.k_BSK);
  const std::vector<std::byte> values = on_host(ex, last.v_BSK);
  passed.last_block.insert(passed.last_block.end(), values.begin(), values.end());
  return passed;
}

struct Case {
  std::string model;
  int ranks;  // along tp
  friend std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << c.model << "_" << c.ranks;
  }
};
class PickedTokens : public testing::TestWithParam<Case> {};

TEST_P(PickedTokens, AreThoseOfAPassThatMakesAll) {
  const auto& [name, ranks] = GetParam();
  const Golden golden(name);
  Picks all;
  for (std::int32_t t = 0; t < kTokens; ++t) all.push_back(t);
  std::mutex mutex;
  run_in_threads(ranks, [&, ranks = ranks](Communicator& world) {
    const Device device = ranks == 1 ? test::test_exec().device : Device{};  // threads have no GPUs to share
    RankModel model(golden.config(), generation_mesh(golden.config(), ranks, ranks), world, device,
                    {.gradients = false});
    model.params.load(model.memory.exec, test::golden_weights(golden));
    const Passed whole = pass(model, all);
    const auto V = static_cast<std::size_t>(model.config.vocab_size);
    // What tp does not divide is made with all others.
    for (const Picks& picks : {Picks{11}, Picks{7, 2}, Picks{3, 11, 0, 7}, Picks{}}) {
      const Passed some = pass(model, picks);
      const std::lock_guard lock(mutex);
      EXPECT_EQ(some.last_block, whole.last_block) << "keys and values, " << picks.size() << " picked";
      for (std::size_t n = 0; n < picks.size(); ++n)
        for (std::size_t v = 0; v < V; ++v) {
          const float expected = whole.logits[static_cast<std::size_t>(picks[n]) * V + v];
          // Of six blocks' sums, as generation_test says; the last block's alone are made in another order here.
          ASSERT_NEAR(some.logits[n * V + v], expected,
                      110 * test::kUnit * std::max(1.0f, std::abs(expected)))
              << "rank " << world.rank() << ", token " << picks[n] << " of " << picks.size();
        }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Models, PickedTokens,
                         testing::Values(Case{"dense", 1}, Case{"dense", 2}, Case{"moe_a27b", 1},
                                         Case{"moe_a27b", 2}),
                         testing::PrintToStringParamName());

// What generation books for a prompt, in products of the model.
TEST(Prompt, IsBookedByARehearsal) {
  for (const std::string name : {"dense", "moe_a27b"}) {
    test::GoldenSpeaker m(name, DType::kBF16);
    generate(m.on_rank, std::vector<Prompt>{{test::drawn_tokens(1, 9, m.vocab()), 0}}, {.max_new_tokens = 1});
    const Cost real = m.on_rank.memory.ledger.total(), dry = rehearse_prompt(m.golden.config(), 9).total();
    EXPECT_GT(real.model_flops, 0) << name;
    EXPECT_EQ(real.model_flops, dry.model_flops) << name;
    EXPECT_LT(dry.model_flops, rehearse_forward(m.golden.config(), 9).total().model_flops) << name;
  }
}

}  // namespace
}  // namespace upmoe

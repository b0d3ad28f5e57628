#include "trainer/generation_room.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "parallel/thread_comm.h"
#include "tests/support/golden_speaker.h"
#include "trainer/memory_estimate.h"

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
    EXPECT_EQ(rows_beside(kept_by(m.on_rank, prompts, options), weights), 0);
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

constexpr Device kCpu{};
const RatesRequest kRequest{.prompt = 9, .output = 8};

KeptBytes kept_of_a_request(const RankModel& model) {
  return kept_by(model, of_lengths({kRequest.prompt}), {.max_new_tokens = kRequest.output});
}

// Two models on one rank, of which only the shapes are told, and memory for so many bytes of weights and rows.
struct TwoModels {
  test::GoldenSpeaker moe{"moe_a27b"}, dense{"dense"};
  const std::vector<ModelToServe> models{{"the mixture", moe.golden.config(), {}},
                                         {"the dense one", dense.golden.config(), {}}};
  KeptBytes of_moe = kept_of_a_request(moe.on_rank), of_dense = kept_of_a_request(dense.on_rank);
  std::vector<RequestRoom> room(double bytes, std::size_t first = 0, Device device = kCpu) {
    return room_for_requests(std::span(models).subspan(first), *moe.self, {.gradients = false}, kRequest,
                             device, bytes / kMemoryOfRows);
  }
};

TEST(RoomForRequests, IsBesideTheWeightsOfAllModels) {
  TwoModels m;
  const double weights = m.of_moe.weights + m.of_dense.weights;
  ASSERT_NE(m.of_moe.row, m.of_dense.row);
  for (const double rows : {1.5, 7.5, 20.5}) {
    const std::vector<RequestRoom> rooms = m.room(weights + rows * m.of_dense.row);
    ASSERT_EQ(rooms.size(), 2u);
    EXPECT_EQ(rooms[0].requests, static_cast<std::int64_t>(rows * m.of_dense.row / m.of_moe.row));
    EXPECT_EQ(rooms[1].requests, static_cast<std::int64_t>(rows));
    for (const RequestRoom& room : rooms) EXPECT_FALSE(room.more_fit);
  }
  const std::vector<RequestRoom> alone = m.room(m.of_dense.weights + 3.5 * m.of_dense.row, 1);
  ASSERT_EQ(alone.size(), 1u);
  EXPECT_EQ(alone[0].requests, 3);
}

// However much fits: a round of a small model would never end.
TEST(RoomForRequests, HasAnEnd) {
  TwoModels m;
  for (const auto& [device, most] :
       {std::pair{kCpu, std::int64_t{64}}, {Device{DeviceType::kCuda, 0}, std::int64_t{256}}})
    for (const bool more : {false, true}) {
      const double rows = static_cast<double>(most) + (more ? 1.5 : 0.5);
      const RequestRoom room = m.room(m.of_dense.weights + rows * m.of_dense.row, 1, device).front();
      EXPECT_EQ(room.requests, most);
      EXPECT_EQ(room.more_fit, more);
    }
}

TEST(RoomForRequests, ThatIsNotThereIsRefusedWithTheSizes) {
  TwoModels m;
  const double weights = m.of_moe.weights + m.of_dense.weights,
               least = std::min(m.of_moe.row, m.of_dense.row);
  for (const double bytes : {0.5 * weights, weights + 0.5 * least}) try {
      m.room(bytes);
      FAIL() << "not refused: " << bytes;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      EXPECT_THAT(e.what(),
                  testing::HasSubstr("the mixture: no memory for one request of 9 tokens in and 8 out"));
      EXPECT_THAT(e.what(),
                  testing::HasSubstr(fmt::format("the weights of all 2 models {:.4g} GB", weights * 1e-9)));
      EXPECT_THAT(e.what(), testing::HasSubstr(fmt::format("there are {:.4g} GB (80 % of", bytes * 1e-9)));
    }
}

// Requests are dealt: every rank has room for as many of them.
TEST(RoomForRequests, IsOfAllRanksTogether) {
  const test::Golden golden("moe_a27b");
  run_in_threads(4, [&](Communicator& world) {
    const MeshSpec mesh = generation_mesh(golden.config(), world.size(), 2);
    const RankModel model(golden.config(), mesh, world, kCpu, {.gradients = false});
    const KeptBytes kept = kept_of_a_request(model);
    const ModelToServe served{"it", golden.config(), mesh};
    const std::vector<RequestRoom> rooms =
        room_for_requests({&served, 1}, world, {.gradients = false}, kRequest, kCpu,
                          (kept.weights + 5.5 * kept.row) / kMemoryOfRows);
    EXPECT_EQ(rooms.front().requests, 2 * 5) << "two pairs of ranks, on rank " << world.rank();
  });
}

TEST(BytesForARank, AreAShareOfWhatTheHostHasLeft) {
  const double left = memory_left();
  ASSERT_GT(left, 0);
  // Other processes take memory meanwhile, or give it back.
  run_in_threads(4, [&](Communicator& world) {
    const double bytes = bytes_for_a_rank(world, kCpu);
    EXPECT_GT(bytes, left / 8);
    EXPECT_LT(bytes, left / 2);
  });
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

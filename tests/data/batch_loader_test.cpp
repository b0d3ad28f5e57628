// The same samples, whatever the number of ranks; and the loader's own rules.

#include "data/batch_loader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <memory>

#include "kernels/core/check.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/token_file_writer.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

class Loader : public testing::Test {
 protected:
  static constexpr std::int64_t kSeq = 4, kVocab = 5000;
  void SetUp() override {
    std::vector<std::uint32_t> tokens;
    std::vector<std::int64_t> ends;
    for (std::uint32_t i = 0; i < 401; ++i) {
      tokens.push_back(i);
      if (i % 7 == 6) ends.push_back(i + 1);
    }
    if (ends.back() != 401) ends.push_back(401);
    write_token_file(dir_ / "tokens.h5", tokens, ends, kVocab);
    tokens[4 * 9] = kVocab;  // in sequence 9, and a target of sequence 8
    write_token_file(dir_ / "broken.h5", tokens, ends, kVocab);
  }

  TokenDataset dataset(bool shuffle, const char* name = "tokens.h5") const {
    return TokenDataset({{dir_ / name, 1.0}}, kSeq, shuffle, 3, kVocab);
  }
  static std::vector<std::int32_t> values(const ConstTensorView& v) {
    return {v.as<std::int32_t>(), v.as<std::int32_t>() + v.elements()};
  }

  const test::TemporaryDirectory folder_;
  const fs::path& dir_ = folder_.path();
};

// (step, micro-batch) -> all four arrays, as the ranks of one layout get them together.
using Dealt = std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::vector<std::int32_t>>>;

TEST_F(Loader, TheSameMicroBatchesForAnyNumberOfRanks) {
  const TokenDataset data = dataset(true);
  const auto deal = [&](int ranks) {
    Dealt dealt;
    for (int rank = 0; rank < ranks; ++rank) {
      BatchLoader loader(data, {12, 2, rank, ranks, true}, 24);
      for (std::int64_t step = 0; step < 5; ++step) {
        for (std::int64_t round = 0; round < loader.rounds(); ++round) {
          const Batch b = loader.next();
          if (b.index < 0) {
            EXPECT_EQ(b.tokens_T.shape, Shape{0});
            EXPECT_EQ(b.sequences(), 0);
            EXPECT_TRUE(b.document_T.given());
            EXPECT_GE(round * ranks + rank, 6);
            continue;
          }
          EXPECT_EQ(b.index, round * ranks + rank);
          EXPECT_EQ(b.sequences(), 2);
          const bool fresh =
              dealt
                  .try_emplace({step, b.index}, std::vector{values(b.tokens_T), values(b.targets_T),
                                                            values(b.positions_T), values(b.document_T)})
                  .second;
          EXPECT_TRUE(fresh);
        }
      }
    }
    return dealt;
  };
  const Dealt one = deal(1);
  ASSERT_EQ(one.size(), 30u);
  for (int ranks : {2, 3, 4, 5, 6, 8}) EXPECT_EQ(deal(ranks), one) << ranks << " ranks";

  // And they are the samples that the contract names.
  std::vector<std::int32_t> tokens(kSeq), targets(kSeq);
  for (const auto& [place, arrays] : one) {
    for (std::int64_t i = 0; i < 2; ++i) {
      data.read(24 + place.first * 12 + place.second * 2 + i, tokens, targets, {}, {});
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), arrays[0].begin() + i * kSeq));
      EXPECT_TRUE(std::equal(targets.begin(), targets.end(), arrays[1].begin() + i * kSeq));
    }
  }
}

// The ranks' counts add up to what their batches hold, step by step, whoever has a round too few.
TEST_F(Loader, TargetsThatCountAreKnownBeforeAStep) {
  std::vector<std::uint32_t> tokens(401);
  std::vector<std::uint8_t> mask(401);
  for (std::uint32_t i = 0; i < 401; ++i) {
    tokens[i] = i;
    mask[i] = i % 5 == 0 && i % 100 >= 16 ? 1 : 0;
  }
  write_token_file(dir_ / "masked.h5", tokens, {}, kVocab, -1, "abc", mask);
  const TokenDataset data({{dir_ / "masked.h5", 1.0, true}}, kSeq, true, 3, kVocab);
  std::vector<std::int64_t> one_rank;
  for (const int ranks : {1, 2, 3, 4}) {
    std::vector<std::int64_t> told(5), held(5);
    for (int rank = 0; rank < ranks; ++rank) {
      BatchLoader loader(data, {12, 2, rank, ranks, false}, 24);
      for (std::size_t step = 0; step < told.size(); ++step) {
        told[step] += loader.counted_targets().value();
        for (std::int64_t round = 0; round < loader.rounds(); ++round)
          for (const std::int32_t target : values(loader.next().targets_T))
            held[step] += target != kIgnoredTarget ? 1 : 0;
      }
    }
    EXPECT_EQ(told, held) << ranks;
    if (ranks == 1) one_rank = told;
    EXPECT_EQ(told, one_rank) << ranks;
  }
  const TokenDataset whole = dataset(true);
  EXPECT_FALSE(BatchLoader(whole, {12, 2, 0, 1, false}, 0).counted_targets().has_value());
}

TEST_F(Loader, PositionCountsSamples) {
  const TokenDataset data = dataset(false);
  BatchLoader loader(data, {8, 2, 1, 3, false}, 16);  // 4 micro-batches over 3 ranks: 2 rounds
  ASSERT_EQ(loader.rounds(), 2);
  std::vector<std::int64_t> positions{loader.position()};
  std::vector<std::int64_t> indices;
  for (int i = 0; i < 4; ++i) {
    indices.push_back(loader.next().index);
    positions.push_back(loader.position());
  }
  EXPECT_EQ(positions, (std::vector<std::int64_t>{16, 22, 24, 30, 32}));
  EXPECT_EQ(indices, (std::vector<std::int64_t>{1, -1, 1, -1}));
}

TEST_F(Loader, WithoutDocumentsPositionsRunOverTheSequence) {
  const TokenDataset data = dataset(false);
  BatchLoader loader(data, {2, 2, 0, 1, false}, 0);
  const Batch b = loader.next();
  EXPECT_EQ(values(b.positions_T), (std::vector<std::int32_t>{0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_FALSE(b.document_T.given());
}

// The views of a batch must outlive the reading ahead, until the next call.
TEST_F(Loader, ABatchStaysWhileOthersAreReadAhead) {
  const TokenDataset data = dataset(false);
  BatchLoader loader(data, {2, 2, 0, 1, false}, 0);
  for (std::int32_t step = 0; step < 40; ++step) {
    const Batch b = loader.next();
    const std::vector<std::int32_t> before = values(b.tokens_T);
    if (step % 10 == 0) usleep(2000);
    EXPECT_EQ(values(b.tokens_T), before);
    EXPECT_EQ(before[0], step * 8);
  }
}

TEST_F(Loader, ErrorsOfTheThreadComeOutOfNextInOrder) {
  const TokenDataset data = dataset(false, "broken.h5");
  BatchLoader loader(data, {2, 2, 0, 1, false}, 0);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(loader.next().index, 0);  // sequences 0 to 7 are good
  for (int again = 0; again < 2; ++again) {
    try {
      loader.next();
      FAIL() << "nothing was thrown";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("broken.h5"), std::string::npos) << e.what();
    }
  }
}

TEST_F(Loader, LeavesAtOnceInAnyState) {
  const TokenDataset data = dataset(true);
  for (int i = 0; i < 50; ++i) {
    BatchLoader loader(data, {4, 1, 0, 2, true}, 0);
    for (int j = 0; j < i % 4; ++j) loader.next();
  }
}

TEST_F(Loader, RefusesImpossibleOptions) {
  const TokenDataset data = dataset(true);
  EXPECT_THROW(BatchLoader(data, {5, 2, 0, 1, false}, 0), Error);
  EXPECT_THROW(BatchLoader(data, {4, 2, 2, 2, false}, 0), Error);
  EXPECT_THROW(BatchLoader(data, {4, 2, 0, 1, false}, 2), Error);
}

}  // namespace
}  // namespace upmoe

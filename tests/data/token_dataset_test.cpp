// Token files: what is read, what is refused. The order of samples: each sequence once per epoch, shares
// within one.

#include "data/token_dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <fstream>
#include <numeric>
#include <set>

#include "data/sample_order.h"
#include "data/token_file_writer.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class TokenFiles : public testing::Test {
 protected:
  void SetUp() override {
    dir_ =
        fs::path(testing::TempDir()) /
        fmt::format("tokens_{}_{}", getpid(), testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  // Tokens first, first + 1, ... so that a value tells its place.
  fs::path write(const std::string& name, std::uint32_t count, std::vector<std::int64_t> ends = {},
                 std::int64_t vocab = 100000, std::uint32_t first = 0) const {
    std::vector<std::uint32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    write_token_file(dir_ / name, tokens, std::move(ends), vocab, 7, "abc");
    return dir_ / name;
  }

  // Message of the error that `f` throws; it must be one of bad input.
  template <class F>
  static std::string message_of(const F& f) {
    try {
      f();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
  }
  static std::string opening(const fs::path& path) {
    return message_of([&] { TokenFile file(path); });
  }

  fs::path dir_;
};

TEST_F(TokenFiles, ReadsWhatWasWritten) {
  const TokenFile file(write("a.h5", 1000, {10, 11, 1000}));
  EXPECT_EQ(file.num_tokens(), 1000);
  EXPECT_EQ(file.vocab_size(), 100000);
  EXPECT_EQ(file.eos_id(), 7);
  EXPECT_EQ(file.tokenizer_sha256(), "abc");
  EXPECT_EQ(file.document_ends(), (std::vector<std::int64_t>{10, 11, 1000}));
  for (std::uint32_t i = 0; i < 1000; ++i) ASSERT_EQ(file.tokens()[i], i);
}

// Written by data/tokenize.py: h5py stores texts with variable length.
TEST_F(TokenFiles, ReadsAFileOfTheTokenizerScript) {
  const TokenFile file(fs::path(UPMOE_SOURCE_DIR) / "tests/data/from_tokenize.h5");
  ASSERT_FALSE(file.document_ends().empty());
  EXPECT_EQ(file.document_ends().back(), file.num_tokens());
  EXPECT_EQ(file.tokenizer_sha256().size(), 64u);
  for (const std::int64_t end : file.document_ends()) {
    EXPECT_EQ(file.tokens()[static_cast<std::size_t>(end - 1)], static_cast<std::uint32_t>(file.eos_id()));
  }
}

TEST_F(TokenFiles, RefusesTruncatedFiles) {
  const fs::path whole = write("whole.h5", 5000);
  const auto bytes = fs::file_size(whole);
  for (const std::uintmax_t length : {std::uintmax_t{0}, std::uintmax_t{100}, bytes / 2, bytes - 1}) {
    const fs::path cut = dir_ / "cut.h5";
    fs::copy_file(whole, cut, fs::copy_options::overwrite_existing);
    fs::resize_file(cut, length);
    EXPECT_THAT(opening(cut), HasSubstr(cut.string())) << length;
  }
}

TEST_F(TokenFiles, RefusesWhatIsNoTokenFile) {
  EXPECT_THAT(opening(dir_ / "missing.h5"), HasSubstr("No such file"));
  EXPECT_THAT(opening(dir_), HasSubstr("not a regular file"));
  std::ofstream(dir_ / "text.h5") << "just text";
  EXPECT_THAT(opening(dir_ / "text.h5"), HasSubstr("not a readable HDF5 file"));
}

TEST_F(TokenFiles, RefusesWrongNumbers) {
  EXPECT_THAT(opening(write("a.h5", 100, {50, 50, 100})), HasSubstr("document_ends[1] = 50"));
  EXPECT_THAT(opening(write("b.h5", 100, {50, 101})), HasSubstr("document_ends[1] = 101"));
  EXPECT_THAT(opening(write("c.h5", 100, {50})), HasSubstr("the last of document_ends is 50, expected 100"));
  EXPECT_THAT(opening(write("d.h5", 100, {-5, 100})), HasSubstr("document_ends[0] = -5"));
  EXPECT_THAT(opening(write("e.h5", 100, {}, 0)), HasSubstr("vocab_size is 0"));
  EXPECT_THAT(opening(write("f.h5", 100, {}, std::int64_t{1} << 40)), HasSubstr("vocab_size"));
  EXPECT_THAT(opening(write("g.h5", 100, {}, 7)), HasSubstr("eos_id is 7"));
  EXPECT_THAT(opening(write("h.h5", 0, {})), HasSubstr("is empty"));
}

// Rebuilds one part of a good file in another way.
class Reshaped {
 public:
  explicit Reshaped(const fs::path& path) : file_(H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT)) {}
  ~Reshaped() { H5Fclose(file_); }
  void replace_tokens(hid_t type, bool chunked) const {
    H5Ldelete(file_, "tokens", H5P_DEFAULT);
    const hsize_t length = 100;
    const hid_t space = H5Screate_simple(1, &length, nullptr), plan = H5Pcreate(H5P_DATASET_CREATE);
    if (chunked) H5Pset_chunk(plan, 1, &length);
    const std::vector<std::uint64_t> zeros(100, 0);
    const hid_t set = H5Dcreate2(file_, "tokens", type, space, H5P_DEFAULT, plan, H5P_DEFAULT);
    H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros.data());
    H5Dclose(set);
    H5Pclose(plan);
    H5Sclose(space);
  }
  void external_storage(const char* target) const {
    H5Ldelete(file_, "tokens", H5P_DEFAULT);
    const hsize_t length = 100;
    const hid_t space = H5Screate_simple(1, &length, nullptr), plan = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(plan, target, 0, 400);
    H5Dclose(H5Dcreate2(file_, "tokens", H5T_STD_U32LE, space, H5P_DEFAULT, plan, H5P_DEFAULT));
    H5Pclose(plan);
    H5Sclose(space);
  }
  void link_tokens(const char* other_file) const {
    H5Ldelete(file_, "tokens", H5P_DEFAULT);
    H5Lcreate_external(other_file, "tokens", file_, "tokens", H5P_DEFAULT, H5P_DEFAULT);
  }
  void remove(const char* attribute) const { H5Adelete(file_, attribute); }

 private:
  hid_t file_;
};

TEST_F(TokenFiles, RefusesOtherLayoutsTypesAndLinks) {
  const auto after = [&](const auto& change) {
    const fs::path path = write("changed.h5", 100);
    change(Reshaped(path));
    return opening(path);
  };
  EXPECT_THAT(after([](const Reshaped& f) { f.replace_tokens(H5T_STD_U32LE, true); }),
              HasSubstr("contiguously"));
  EXPECT_THAT(after([](const Reshaped& f) { f.replace_tokens(H5T_STD_I32LE, false); }),
              HasSubstr("unsigned"));
  EXPECT_THAT(after([](const Reshaped& f) { f.replace_tokens(H5T_STD_U32BE, false); }),
              HasSubstr("little-endian"));
  EXPECT_THAT(after([](const Reshaped& f) { f.replace_tokens(H5T_STD_U16LE, false); }), HasSubstr("32-bit"));
  EXPECT_THAT(after([](const Reshaped& f) { f.external_storage("/etc/hostname"); }), HasSubstr("external"));
  EXPECT_THAT(after([](const Reshaped& f) { f.link_tokens("other.h5"); }), HasSubstr("link"));
  EXPECT_THAT(after([](const Reshaped& f) { f.remove("format"); }), HasSubstr("'format' is missing"));
  EXPECT_THAT(after([](const Reshaped& f) { f.remove("tokenizer_sha256"); }), HasSubstr("tokenizer_sha256"));
}

TEST_F(TokenFiles, InOrderWithoutShuffle) {
  const TokenDataset data({{write("a.h5", 33), 1.0}}, 8, false, 1, 100000);
  ASSERT_EQ(data.num_sequences(), 4);  // 33 tokens: the last one is only a target
  std::vector<std::int32_t> tokens(8), targets(8);
  for (int sample = 0; sample < 9; ++sample) {
    data.read(sample, tokens, targets, {}, {});
    for (int i = 0; i < 8; ++i) {
      ASSERT_EQ(tokens[static_cast<std::size_t>(i)], sample % 4 * 8 + i);
      ASSERT_EQ(targets[static_cast<std::size_t>(i)], sample % 4 * 8 + i + 1);
    }
  }
}

TEST_F(TokenFiles, DocumentsRestartWithinASequence) {
  const TokenDataset data({{write("a.h5", 17, {3, 8, 10, 17}), 1.0}}, 8, false, 1, 100000);
  std::vector<std::int32_t> tokens(8), targets(8), documents(8), positions(8);
  data.read(0, tokens, targets, documents, positions);
  EXPECT_EQ(documents, (std::vector<std::int32_t>{0, 0, 0, 1, 1, 1, 1, 1}));
  EXPECT_EQ(positions, (std::vector<std::int32_t>{0, 1, 2, 0, 1, 2, 3, 4}));
  data.read(1, tokens, targets, documents, positions);  // begins exactly where a document begins
  EXPECT_EQ(documents, (std::vector<std::int32_t>{0, 0, 1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(positions, (std::vector<std::int32_t>{0, 1, 0, 1, 2, 3, 4, 5}));
}

TEST_F(TokenFiles, TokensBeyondTheVocabularyAreFoundWhenRead) {
  const TokenDataset data({{write("a.h5", 65, {}, 60), 1.0}}, 8, false, 1, 60);
  std::vector<std::int32_t> tokens(8), targets(8);
  for (int sample = 0; sample < 7; ++sample) data.read(sample, tokens, targets, {}, {});  // targets up to 56
  EXPECT_THAT(message_of([&] { data.read(7, tokens, targets, {}, {}); }), HasSubstr("token 60 is 60"));
}

TEST_F(TokenFiles, RefusesAnotherVocabularyAndTooShortFiles) {
  const fs::path path = write("a.h5", 100, {}, 1000);
  EXPECT_THAT(message_of([&] { TokenDataset({{path, 1.0}}, 8, false, 1, 999); }), HasSubstr("1000 tokens"));
  EXPECT_THAT(message_of([&] { TokenDataset({{path, 1.0}}, 100, false, 1, 1000); }), HasSubstr("needs 101"));
  EXPECT_NO_THROW(TokenDataset({{path, 1.0}}, 99, false, 1, 1000));
}

TEST_F(TokenFiles, FingerprintFollowsWhatTheOrderDependsOn) {
  const fs::path a = write("a.h5", 1000), b = write("b.h5", 2000);
  const auto print = [](std::vector<TokenDataset::Source> s, std::int64_t length, bool shuffle,
                        std::uint64_t seed) {
    return TokenDataset(s, length, shuffle, seed, 100000).fingerprint();
  };
  const std::string base = print({{a, 1}, {b, 1}}, 8, true, 1);
  EXPECT_EQ(base, print({{a, 2}, {b, 2}}, 8, true, 1));
  EXPECT_NE(base, print({{b, 1}, {a, 1}}, 8, true, 1));
  EXPECT_NE(base, print({{a, 1}, {b, 2}}, 8, true, 1));
  EXPECT_NE(base, print({{a, 1}, {b, 1}}, 16, true, 1));
  EXPECT_NE(base, print({{a, 1}, {b, 1}}, 8, false, 1));
  EXPECT_NE(base, print({{a, 1}, {b, 1}}, 8, true, 2));
  EXPECT_EQ(print({{a, 1}}, 8, false, 1), print({{a, 1}}, 8, false, 2));  // the seed orders nothing then
}

TEST(SampleOrder, PermutedIsABijection) {
  for (const std::int64_t n : {1, 2, 3, 5, 16, 17, 100, 1000, 4096, 4097}) {
    std::set<std::int64_t> seen;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t p = permuted(i, n, 42);
      ASSERT_TRUE(p >= 0 && p < n);
      seen.insert(p);
    }
    EXPECT_EQ(static_cast<std::int64_t>(seen.size()), n);
  }
  const std::int64_t large = std::int64_t{1} << 50;  // no table: as quick as a small one
  for (std::int64_t i : {std::int64_t{0}, large / 3, large - 1}) {
    const std::int64_t p = permuted(i, large, 42);
    EXPECT_TRUE(p >= 0 && p < large);
  }
}

// Each place equally often, and neighbours not kept together.
TEST(SampleOrder, PermutedMixes) {
  constexpr std::int64_t kN = 50, kKeys = 4000;
  std::vector<int> first(kN, 0);
  int neighbours = 0;
  for (std::uint64_t key = 0; key < kKeys; ++key) {
    const std::int64_t a = permuted(0, kN, key), b = permuted(1, kN, key);
    ++first[static_cast<std::size_t>(a)];
    neighbours += b == a + 1 ? 1 : 0;
  }
  double chi_square = 0;
  for (int count : first) chi_square += (count - 80.0) * (count - 80.0) / 80.0;
  EXPECT_LT(chi_square, 100.0);            // 49 degrees of freedom: 1 in 40,000 exceeds 100
  EXPECT_NEAR(neighbours, 80 * 0.98, 45);  // 49 of 50 * 49 pairs; 5 standard deviations
}

TEST(SampleOrder, EverySequenceOncePerEpochAndAnewInEach) {
  const SampleOrder order({100, 37}, {3.0, 1.0}, true, 9);
  std::vector<std::vector<std::vector<std::int64_t>>> seen(2);  // source, epoch
  for (std::int64_t i = 0; i < 800; ++i) {
    const SampleOrder::Place p = order.at(i);
    auto& epochs = seen[static_cast<std::size_t>(p.source)];
    if (static_cast<std::size_t>(p.epoch) >= epochs.size()) epochs.emplace_back();
    epochs[static_cast<std::size_t>(p.epoch)].push_back(p.sequence);
  }
  ASSERT_EQ(seen[0].size(), 6u);
  EXPECT_NE(seen[0][0], seen[0][1]);
  for (std::size_t source = 0; source < 2; ++source) {
    const std::size_t n = source == 0 ? 100 : 37;
    for (std::size_t epoch = 0; epoch + 1 < seen[source].size(); ++epoch) {
      std::vector<std::int64_t> sorted = seen[source][epoch];
      std::sort(sorted.begin(), sorted.end());
      ASSERT_EQ(sorted.size(), n);
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(sorted[i], static_cast<std::int64_t>(i));
    }
  }
}

TEST(SampleOrder, SharesWithinOne) {
  const std::vector<std::vector<double>> mixes = {{1},
                                                  {1, 1},
                                                  {0.7, 0.3},
                                                  {1, 2, 3},
                                                  {5, 1, 1},
                                                  {1, 1, 1, 1, 1},
                                                  {0.01, 0.33, 0.66},
                                                  {97, 1, 1, 1},
                                                  {8, 5, 3, 2, 1, 1},
                                                  {0.123, 0.456, 0.421}};
  for (const auto& weights : mixes) {
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    const SampleOrder order(std::vector<std::int64_t>(weights.size(), 1000), weights, false, 1);
    std::vector<std::int64_t> count(weights.size(), 0);
    for (std::int64_t i = 0; i < 20000; ++i) {
      const SampleOrder::Place p = order.at(i);
      auto& turn = count[static_cast<std::size_t>(p.source)];
      ASSERT_EQ(p.epoch * 1000 + p.sequence, turn);  // no gap: the next of that source
      ++turn;
      for (std::size_t k = 0; k < weights.size(); ++k) {
        const double share = static_cast<double>(i + 1) * weights[k] / sum;
        ASSERT_LT(std::abs(static_cast<double>(count[k]) - share), 1.0)
            << "source " << k << " after " << i + 1;
      }
    }
  }
}

// Weights without a short period are rounded to 1/65536 of all.
TEST(SampleOrder, OddWeights) {
  const std::vector<double> weights = {3.14159265358979, 2.71828182845905, 1.41421356237310};
  const SampleOrder order({10, 10, 10}, weights, false, 1);
  const double sum = weights[0] + weights[1] + weights[2];
  ASSERT_EQ(std::accumulate(order.parts().begin(), order.parts().end(), std::int64_t{0}), 65536);
  for (std::size_t k = 0; k < 3; ++k) {
    EXPECT_NEAR(static_cast<double>(order.parts()[k]), weights[k] / sum * 65536, 1.0);
  }
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, 1e-7}, false, 1), Error);
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, 0.0}, false, 1), Error);
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, std::nan("")}, false, 1), Error);
}

}  // namespace
}  // namespace upmoe

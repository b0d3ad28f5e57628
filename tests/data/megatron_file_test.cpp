// Indexed data sets of Megatron-LM: read as HDF5 files are, token by token; what is wrong in one is found or harmless.

#include <chrono>
#include <functional>

#include "data/token_dataset.h"
#include "tests/data/token_files.h"
#include "tests/support/megatron_set.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class MegatronFiles : public TokenFiles {
 protected:
  static std::vector<std::uint32_t> numbers(std::uint32_t count, std::uint32_t vocab) {
    std::vector<std::uint32_t> tokens(count);
    for (std::uint32_t i = 0; i < count; ++i) tokens[i] = i * 7919u % vocab;
    return tokens;
  }
  // 10 tokens in three documents.
  static MegatronSet small() {
    const std::int64_t ends[] = {3, 4, 10};
    return MegatronSet::of(numbers(10, 100), ends);
  }
  // The words about a set that `change` made wrong.
  std::string words(const std::function<void(MegatronSet&)>& change) const {
    MegatronSet set = small();
    change(set);
    const fs::path path = set.write(dir_ / "wrong");
    return message_of([&] { open_token_file(path)->verify(); });
  }
};

// Written by tests/support/megatron_set.py.
TEST_F(MegatronFiles, ReadsWhatAnotherProgramWrote) {
  for (const char* end : {"bin", "idx"}) {
    const auto file = open_token_file(fs::path(UPMOE_SOURCE_DIR "/tests/data/from_megatron.") += end);
    EXPECT_EQ(file->path().extension(), ".bin");
    EXPECT_EQ(file->document_ends(), (std::vector<std::int64_t>{5, 305}));  // one without tokens is none
    EXPECT_EQ(file->vocab_size(), 0);
    EXPECT_EQ(file->eos_id(), -1);
    EXPECT_FALSE(file->checksummed());
    EXPECT_FALSE(file->has_loss_mask());
    const std::vector<std::uint32_t> tokens = all_tokens(*file);
    ASSERT_EQ(tokens.size(), 305u);
    EXPECT_EQ((std::vector<std::uint32_t>(tokens.begin(), tokens.begin() + 5)),
              (std::vector<std::uint32_t>{5, 6, 7, 8, 9}));
    for (std::uint32_t i = 0; i < 300; ++i) ASSERT_EQ(tokens[5 + i], 11 * i % 60000);
  }
}

TEST_F(MegatronFiles, EveryIntegerTypeGivesTheSameTokens) {
  const std::vector<std::uint32_t> tokens = numbers(500, 128);
  const std::int64_t ends[] = {100, 101, 500};
  const auto expect_same = [&](const MegatronSet& set) {
    EXPECT_EQ(all_tokens(*open_token_file(set.write(dir_ / "typed"))), tokens) << int{set.code};
  };
  expect_same(MegatronSet::of<std::uint8_t>(tokens, ends, 1));
  expect_same(MegatronSet::of<std::int8_t>(tokens, ends, 2));
  expect_same(MegatronSet::of<std::int16_t>(tokens, ends, 3));
  expect_same(MegatronSet::of<std::int32_t>(tokens, ends, 4));
  expect_same(MegatronSet::of<std::int64_t>(tokens, ends, 5));
  expect_same(MegatronSet::of<std::uint16_t>(tokens, ends, 8));
  expect_same(MegatronSet::of<std::uint32_t>(tokens, ends, 9));
}

TEST_F(MegatronFiles, TheLargestTokensKeepTheirValues) {
  const std::int64_t ends[] = {2};
  const std::vector<std::uint32_t> narrow{65535, 0}, wide{4294967295u, 0};
  EXPECT_EQ(all_tokens(*open_token_file(MegatronSet::of<std::uint16_t>(narrow, ends, 8).write(dir_ / "a"))),
            narrow);
  EXPECT_EQ(all_tokens(*open_token_file(MegatronSet::of<std::uint32_t>(wide, ends, 9).write(dir_ / "b"))),
            wide);
  EXPECT_EQ(all_tokens(*open_token_file(MegatronSet::of<std::int64_t>(wide, ends, 5).write(dir_ / "c"))),
            wide);
}

TEST_F(MegatronFiles, SamplesAreThoseOfAnEqualHdf5File) {
  const std::vector<std::uint32_t> tokens = numbers(1000, 300);
  const std::vector<std::int64_t> ends{3, 40, 41, 500, 1000};
  write_token_file(dir_ / "a.h5", tokens, ends, 300);
  const fs::path other = MegatronSet::of<std::uint16_t>(tokens, ends, 8).write(dir_ / "b");
  const TokenDataset one({{dir_ / "a.h5", 1.0}}, 16, true, 5, 300), two({{other, 1.0}}, 16, true, 5, 300);
  ASSERT_EQ(one.num_sequences(), two.num_sequences());
  std::vector<std::int32_t> of_one[4], of_two[4];
  for (auto& part : of_one) part.resize(16);
  for (auto& part : of_two) part.resize(16);
  for (std::int64_t i = 0; i < 2 * one.num_sequences(); ++i) {
    one.read(i, of_one[0], of_one[1], of_one[2], of_one[3]);
    two.read(i, of_two[0], of_two[1], of_two[2], of_two[3]);
    for (std::size_t part = 0; part < 4; ++part) ASSERT_EQ(of_one[part], of_two[part]) << i;
  }
}

TEST_F(MegatronFiles, RefusesAnIndexThatIsWrong) {
  EXPECT_THAT(words([](auto& set) { set.mark[3] = 'X'; }),
              AllOf(HasSubstr("wrong.idx"), HasSubstr("MMIDIDX")));
  EXPECT_THAT(words([](auto& set) { set.version = 2; }), HasSubstr("version 2, expected 1"));
  EXPECT_THAT(words([](auto& set) { set.code = 0; }), HasSubstr("type 0"));
  EXPECT_THAT(words([](auto& set) { set.code = 10; }), HasSubstr("type 10"));
  EXPECT_THAT(words([](auto& set) { set.code = 6; }), HasSubstr("float64"));
  EXPECT_THAT(words([](auto& set) { set.code = 7; }), HasSubstr("float32"));
  // Half as many tokens of twice the size, and the other way round.
  EXPECT_THAT(words([](auto& set) { set.code = 5; }), HasSubstr("sequence 2 has 6 tokens, expected 0 to 1"));
  EXPECT_THAT(words([](auto& set) { set.code = 8; }), HasSubstr("have 10 tokens, but"));
  EXPECT_THAT(words([](auto& set) { set.lengths[1] = -1; }), HasSubstr("sequence 1 has -1 tokens"));
  EXPECT_THAT(words([](auto& set) { set.lengths[0] = 2147483647; }), HasSubstr("sequence 0 has 2147483647"));
  EXPECT_THAT(words([](auto& set) { set.lengths[2] = 5; }), HasSubstr("have 9 tokens, but"));
  EXPECT_THAT(words([](auto& set) { set.begins[0] = 4; }),
              HasSubstr("sequence 0 begins at byte 4, expected 0"));
  EXPECT_THAT(words([](auto& set) { std::swap(set.begins[1], set.begins[2]); }),
              HasSubstr("sequence 1 begins at"));
  EXPECT_THAT(words([](auto& set) { set.begins[2] = std::int64_t{1} << 60; }), HasSubstr("expected 16"));
  EXPECT_THAT(words([](auto& set) { set.begins[2] = -16; }), HasSubstr("expected 16"));
  EXPECT_THAT(words([](auto& set) { set.boundaries[0] = 1; }),
              HasSubstr("document 0 begins with sequence 1"));
  EXPECT_THAT(words([](auto& set) {
                set.boundaries = {0, 2, 1, 3};
              }),
              HasSubstr("document 2 begins with sequence 1"));
  EXPECT_THAT(words([](auto& set) { set.boundaries[3] = 4; }),
              HasSubstr("document 3 begins with sequence 4"));
  EXPECT_THAT(words([](auto& set) { set.boundaries[1] = -1; }), HasSubstr("sequence -1"));
  EXPECT_THAT(words([](auto& set) {
                set.boundaries = {0, 1};
              }),
              HasSubstr("ends before sequence 1, expected 3"));
  EXPECT_THAT(words([](auto& set) { set.boundaries.clear(); }), HasSubstr("ends before sequence 0"));
}

TEST_F(MegatronFiles, RefusesTokensThatAreNone) {
  EXPECT_THAT(words([](auto& set) { set.tokens.back() = '\x80'; }),
              AllOf(HasSubstr("wrong.bin: token 9 is -"), HasSubstr("no token")));
  EXPECT_THAT(words([](auto& set) { set.tokens.clear(); }), HasSubstr("holds no tokens"));
  EXPECT_THAT(words([](auto& set) { set.tokens.pop_back(); }), HasSubstr("39 bytes are no whole number"));
  EXPECT_THAT(words([](auto& set) { set.tokens.resize(36); }), HasSubstr("expected 0 to 5"));
  EXPECT_THAT(words([](auto& set) { set.tokens.append(4, '\0'); }), HasSubstr("have 10 tokens, but"));
  const std::int64_t ends[] = {2};
  MegatronSet wide = MegatronSet::of<std::int64_t>(std::vector<std::uint32_t>{1, 2}, ends, 5);
  wide.tokens[4] = 1;  // 2^32 more
  EXPECT_THAT(message_of([&] { open_token_file(wide.write(dir_ / "wide"))->verify(); }),
              HasSubstr("4294967297"));
}

TEST_F(MegatronFiles, CountsThatTheFileDoesNotHoldAreNotBelieved) {
  const std::string good = small().index();
  for (const std::size_t at : {std::size_t{18}, std::size_t{26}})
    for (const std::uint64_t count : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{5},
                                      std::uint64_t{1} << 40, std::uint64_t{1} << 61, ~std::uint64_t{0}}) {
      MegatronSet set = small();
      const fs::path path = set.write(dir_ / "counts");
      std::string wrong = good;
      std::memcpy(wrong.data() + at, &count, sizeof(count));
      std::ofstream(dir_ / "counts.idx", std::ios::binary) << wrong;
      EXPECT_THAT(message_of([&] { open_token_file(path); }), HasSubstr("document boundaries do not give"))
          << count;
    }
  MegatronSet set = small();
  const fs::path path = set.write(dir_ / "modes");
  std::ofstream(dir_ / "modes.idx", std::ios::binary | std::ios::app) << std::string(3, '\0');
  EXPECT_THAT(message_of([&] { open_token_file(path); }), HasSubstr("a mode for each sequence"));
}

TEST_F(MegatronFiles, ACutIndexIsRefused) {
  const fs::path path = small().write(dir_ / "cut");
  const std::string whole = small().index();
  for (std::size_t length = 0; length < whole.size(); ++length) {
    std::ofstream(dir_ / "cut.idx", std::ios::binary) << whole.substr(0, length);
    EXPECT_THAT(message_of([&] { open_token_file(path); }), HasSubstr("cut.idx")) << length;
  }
}

// There are no checksums. A flipped bit moves no token to another place; what moves, where a document ends, is another
// identity.
TEST_F(MegatronFiles, AFlippedBitOfTheIndexIsRefusedOrKnown) {
  const fs::path path = small().write(dir_ / "flip");
  const auto good = open_token_file(path);
  const std::vector<std::uint32_t> tokens = all_tokens(*good);
  const std::string identity = good->identity(), whole = small().index();
  int refused = 0, known = 0;
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string wrong = whole;
    wrong[bit / 8] = static_cast<char>(wrong[bit / 8] ^ (1 << bit % 8));
    std::ofstream(dir_ / "flip.idx", std::ios::binary) << wrong;
    try {
      const auto file = open_token_file(path);
      EXPECT_EQ(all_tokens(*file), tokens) << bit;
      EXPECT_NE(file->identity(), identity) << bit;
      ++known;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      ++refused;
    }
  }
  EXPECT_GT(refused, 8 * 60);
  EXPECT_GT(known, 0);
}

TEST_F(MegatronFiles, HalfASetIsToldByName) {
  const fs::path path = small().write(dir_ / "half");
  fs::remove(dir_ / "half.idx");
  EXPECT_THAT(opening(path), AllOf(HasSubstr("half.idx is missing"), HasSubstr("Megatron-LM")));
  small().write(dir_ / "half");
  fs::remove(path);
  EXPECT_THAT(opening(dir_ / "half.idx"), HasSubstr("half.bin is missing"));
  EXPECT_THAT(opening(dir_ / "nothing.bin"), HasSubstr("No such file"));
}

TEST_F(MegatronFiles, ASetNamedAsMegatronDoesIsTold) {
  small().write(dir_ / "set");
  EXPECT_THAT(opening(dir_ / "set"), HasSubstr("is given as " + (dir_ / "set.bin").string()));
  fs::remove(dir_ / "set.idx");
  EXPECT_THAT(opening(dir_ / "set"), testing::Not(HasSubstr("Megatron")));
}

TEST_F(MegatronFiles, TokensBeyondTheModelsVocabularyAreRefused) {
  const std::int64_t ends[] = {65};
  const fs::path path = MegatronSet::of(numbers(65, 65), ends).write(dir_ / "a");
  const TokenDataset data({{path, 1.0}}, 64, false, 1, 64);
  std::vector<std::int32_t> tokens(64), targets(64);
  EXPECT_THAT(message_of([&] { data.read(0, tokens, targets, {}, {}); }),
              HasSubstr("is 64, but the model's"));
  EXPECT_THAT(message_of([&] {
                TokenDataset({{path, 1.0, true}}, 64, false, 1, 65);
              }),
              HasSubstr("no loss mask"));
}

TEST_F(MegatronFiles, AResumeKnowsAnotherIndexAndAnotherSize) {
  const std::vector<std::uint32_t> tokens = numbers(100, 50);
  const auto print = [&](std::uint32_t count, std::vector<std::int64_t> ends) {
    const fs::path path = MegatronSet::of(std::span(tokens).first(count), ends).write(dir_ / "a");
    return TokenDataset({{path, 1.0}}, 8, false, 1, 50).fingerprint();
  };
  const std::string before = print(100, {30, 100});
  EXPECT_THAT(before, HasSubstr("-"));  // contents are part of it
  EXPECT_EQ(print(100, {30, 100}), before);
  EXPECT_NE(print(100, {31, 100}), before);
  EXPECT_NE(print(99, {30, 99}), before);
}

TEST_F(MegatronFiles, AChangeWhileAFileIsInUseIsAnError) {
  const fs::path path = small().write(dir_ / "a");
  const auto file = open_token_file(path);
  file->verify();
  fs::last_write_time(path, fs::last_write_time(path) + std::chrono::seconds(5));
  EXPECT_THAT(message_of([&] { file->verify(); }),
              AllOf(HasSubstr("a.bin"), HasSubstr("changed while it was in")));
}

}  // namespace
}  // namespace upmoe

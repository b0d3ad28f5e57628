// Token files as data: tokenizers that agree, sequences in order, documents, fingerprints.

#include "data/token_dataset.h"

#include <fstream>

#include "data/repeated_files.h"
#include "data/sha256.h"
#include "data/tokenizer_match.h"
#include "tests/data/token_files.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

TEST_F(TokenFiles, ATokenizerOtherThanTheModelsIsTold) {
  const std::string content = R"({"version": "1.0"})";
  const auto file = [&](const std::string& name, const std::string& digest, std::int64_t eos) {
    write_token_file(dir_ / name, std::vector<std::uint32_t>(10), {}, 100, eos, digest);
    return open_token_file(dir_ / name);
  };
  const auto right = file("right.h5", sha256(content), 7), other = file("other.h5", sha256("other"), 7),
             unknown = file("unknown.h5", std::string(64, '0'), -1), odd = file("odd.h5", sha256(content), 9);
  std::ofstream(dir_ / "tokenizer.json") << content;
  std::ofstream(dir_ / "config.json") << R"({"eos_token_id": 3})";
  std::ofstream(dir_ / "generation_config.json") << R"({"eos_token_id": [7, 8]})";
  EXPECT_TRUE(tokenizer_differences(dir_, {right.get(), unknown.get()}).empty());
  EXPECT_THAT(tokenizer_differences(dir_, {other.get()}),
              testing::ElementsAre(testing::AllOf(HasSubstr("other.h5 was made with another tokenizer"),
                                                  HasSubstr((dir_ / "tokenizer.json").string()))));
  EXPECT_EQ(unknown_tokenizers(dir_, {right.get(), other.get()}), "");
  EXPECT_EQ(unknown_tokenizers({}, {unknown.get()}), "");
  EXPECT_THAT(unknown_tokenizers(dir_, {right.get(), unknown.get()}),
              testing::AllOf(HasSubstr("unknown.h5 does not say which tokenizer"),
                             HasSubstr((dir_ / "tokenizer.json").string())));
  EXPECT_THAT(unknown_tokenizers(dir_, {unknown.get(), unknown.get()}), HasSubstr(", as 1 more do not;"));
  EXPECT_THAT(tokenizer_differences({}, {right.get(), other.get()}),
              testing::ElementsAre(HasSubstr("different tokenizers")));
  EXPECT_THAT(tokenizer_differences(dir_, {odd.get()}), testing::ElementsAre(HasSubstr("end with token 9")));
}

TEST_F(TokenFiles, AFileThatIsGivenTwiceIsTold) {
  const auto open = [&](const std::string& name) { return open_token_file(dir_ / name); };
  write("a.h5", 100, {50, 100});
  write("other_tokens.h5", 100, {50, 100}, 100000, 1);
  write("other_documents.h5", 100, {100});
  fs::copy_file(dir_ / "a.h5", dir_ / "copy.h5");
  fs::create_symlink("a.h5", dir_ / "link.h5");
  fs::copy_file(fs::path(UPMOE_SOURCE_DIR) / "tests/data/from_tokenize.h5",
                dir_ / "bare.h5");  // has no checksums
  const auto a = open("a.h5"), copy = open("copy.h5"), link = open("link.h5"), bare = open("bare.h5"),
             tokens = open("other_tokens.h5"), documents = open("other_documents.h5");
  fs::copy_file(dir_ / "bare.h5", dir_ / "bare_copy.h5");
  for (const TokenFile* same : {a.get(), copy.get(), link.get()}) EXPECT_TRUE(same_tokens(*a, *same));
  for (const TokenFile* other : {tokens.get(), documents.get(), bare.get()})
    EXPECT_FALSE(same_tokens(*a, *other)) << other->path();
  EXPECT_TRUE(same_tokens(*bare, *open("bare.h5")));
  EXPECT_FALSE(same_tokens(*bare, *open("bare_copy.h5")));  // nothing says so
  EXPECT_THAT(repeated_files({tokens.get(), a.get()}, {documents.get(), bare.get()}), testing::IsEmpty());
  EXPECT_THAT(
      repeated_files({tokens.get(), a.get(), link.get()}, {documents.get(), copy.get()}),
      testing::ElementsAre(
          testing::AllOf(HasSubstr("copy.h5 is held out, but"), HasSubstr("data.train[1]")),
          testing::AllOf(HasSubstr("data.train[2]"), HasSubstr("link.h5"), HasSubstr("of data.train[1]"))));
}

TEST_F(TokenFiles, ATeachersTokenizerOtherThanTheModelsIsTold) {
  for (const char* name : {"model", "same", "other", "none"}) fs::create_directory(dir_ / name);
  for (const char* name : {"model", "same"}) std::ofstream(dir_ / name / "tokenizer.json") << "{}";
  std::ofstream(dir_ / "other/tokenizer.json") << R"({"version": "1.0"})";
  const auto told = [&](const fs::path& model, const fs::path& teacher) {
    return teacher_tokenizer_difference(model, teacher);
  };
  EXPECT_THAT(told(dir_ / "model", dir_ / "other"),
              testing::AllOf(HasSubstr((dir_ / "model/tokenizer.json").string()),
                             HasSubstr((dir_ / "other/tokenizer.json").string()),
                             HasSubstr(sha256("{}").substr(0, 12))));
  EXPECT_EQ(told(dir_ / "model", dir_ / "same"), "");
  EXPECT_EQ(told(dir_ / "model", dir_ / "none"), "");
  EXPECT_EQ(told(dir_ / "none", dir_ / "other"), "");
  EXPECT_EQ(told({}, dir_ / "other"), "");
  EXPECT_EQ(told(dir_ / "model", {}), "");
}

TEST_F(TokenFiles, AResumeKnowsOtherContentOfTheSameLength) {
  const fs::path path = write("a.h5", 1000);
  const auto open = [&] { return TokenDataset({{path, 1.0}}, 8, false, 1, 200000); };
  const std::string before = open().fingerprint();
  EXPECT_TRUE(open().continues(before));
  // A checkpoint of before there were checksums knows the order alone.
  EXPECT_TRUE(open().continues(before.substr(0, before.find('-'))));
  write("a.h5", 1000, {}, 100000, 1);
  EXPECT_FALSE(open().continues(before));
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

}  // namespace
}  // namespace upmoe

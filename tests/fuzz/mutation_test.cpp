// The fuzzers' entries over seeded random mutations of good inputs: runs everywhere, the same every time.

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "data/manifest.h"
#include "data/safetensors.h"
#include "kernels/core/philox.h"
#include "tests/fuzz/fuzz_entries.h"
#include "tests/support/read_file.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/token_file_writer.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : seed_(seed) {}
  std::uint32_t below(std::size_t n) {
    return n == 0 ? 0 : philox(seed_, next_++)[0] % static_cast<std::uint32_t>(n);
  }

  std::string mutate(std::string text, const std::vector<std::string>& corpus) {
    for (std::uint32_t n = 1 + below(4); n > 0; --n) {
      const std::size_t at = below(text.size() + 1),
                        length = below(std::min<std::size_t>(text.size() - at, 40) + 1);
      switch (below(8)) {
        case 0:
          if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
          break;
        case 1:
          if (at < text.size()) text[at] = static_cast<char>(below(256));
          break;
        case 2:
          text.erase(at, length);
          break;
        case 3:
          text.insert(at, text.substr(at, length));
          break;
        case 4:
          text.insert(at, kTokens[below(kTokens.size())]);
          break;
        case 5: {
          const std::string& other = corpus[below(corpus.size())];
          text = text.substr(0, at) + other.substr(below(other.size() + 1));
          break;
        }
        case 6:
          text.resize(at);
          break;
        default:
          text.replace(at, length, kTokens[below(kTokens.size())]);
      }
    }
    return text;
  }

 private:
  static constexpr std::array<const char*, 28> kTokens{"0",
                                                       "-1",
                                                       "1e999",
                                                       "18446744073709551615",
                                                       "9223372036854775808",
                                                       "1.0",
                                                       "null",
                                                       "true",
                                                       "nan",
                                                       "\"\"",
                                                       "{}",
                                                       "[]",
                                                       "[[[[",
                                                       "{{{{",
                                                       ":",
                                                       "\n",
                                                       "- ",
                                                       "\t",
                                                       "&a ",
                                                       "*a",
                                                       "<<",
                                                       "!!",
                                                       "\xff",
                                                       "\\u0000",
                                                       "%",
                                                       "|\n ",
                                                       "? ",
                                                       "data_offsets"};
  std::uint64_t seed_, next_ = 0;
};

std::vector<std::string> safetensors_corpus() {
  std::vector<std::string> corpus;
  for (std::int64_t n = 0; n < 6; ++n) {
    std::vector<SafetensorsEntry> entries;
    for (std::int64_t i = 0; i < n; ++i)
      entries.push_back({fmt::format("layer.{}", i), i % 2 == 0 ? "BF16" : "F4", {2, i}, 0, 0});
    const std::string header = make_safetensors_header(entries, {{"format", "pt"}});
    corpus.push_back(header + std::string(n == 0 ? 0 : entries.back().end, '\0'));
  }
  return corpus;
}

// The length word is put right again in half of the cases, or nothing behind it would ever be reached.
TEST(Mutations, Safetensors) {
  const std::vector<std::string> corpus = safetensors_corpus();
  int accepted = 0;
  for (std::uint64_t i = 0; i < 20'000; ++i) {
    Mutator mutator(i);
    const std::string& good = corpus[mutator.below(corpus.size())];
    std::string bytes = mutator.mutate(good, corpus);
    if (i % 2 == 0 && good.size() > 8) {
      std::string header = good.substr(8, good.find('}') == std::string::npos ? 0 : good.rfind('}') - 7);
      header = mutator.mutate(header, corpus);
      const std::uint64_t n = header.size();
      bytes.assign(reinterpret_cast<const char*>(&n), 8);
      bytes += header + std::string(mutator.below(24), '\0');
    }
    accepted += fuzz::safetensors(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()) ? 1 : 0;
  }
  EXPECT_GT(accepted, 10);  // the mutations are not all hopeless
  EXPECT_LT(accepted, 15'000);
}

TEST(Mutations, Configurations) {
  std::vector<std::string> corpus;
  for (const auto& entry : fs::recursive_directory_iterator(UPMOE_SOURCE_DIR "/configs"))
    if (entry.path().extension() == ".yaml") corpus.push_back(test::read_file(entry.path()));
  for (const auto& entry : fs::recursive_directory_iterator(UPMOE_SOURCE_DIR "/tests/golden"))
    if (entry.path().filename() == "config.json") corpus.push_back(test::read_file(entry.path()));
  ASSERT_GE(corpus.size(), 6u);
  for (std::uint64_t i = 0; i < 20'000; ++i) {
    Mutator mutator(i + 1'000'000);
    const std::string text = mutator.mutate(corpus[mutator.below(corpus.size())], corpus);
    fuzz::configurations(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  }
}

// How many of `count` mutations an entry accepts.
int accepted_of(int count, std::uint64_t seed, const std::vector<std::string>& corpus,
                bool (*entry)(const std::uint8_t*, std::size_t)) {
  int accepted = 0;
  for (int i = 0; i < count; ++i) {
    Mutator mutator(seed + static_cast<std::uint64_t>(i));
    const std::string text = mutator.mutate(corpus[mutator.below(corpus.size())], corpus);
    accepted += entry(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()) ? 1 : 0;
  }
  return accepted;
}

TEST(Mutations, TokenFiles) {
  const test::TemporaryDirectory folder;
  const fs::path path = folder.path() / "tokens.h5";
  std::vector<std::uint32_t> tokens(500);
  for (std::uint32_t i = 0; i < 500; ++i) tokens[i] = i % 64;
  write_token_file(path, tokens, {100, 250, 500}, 64);
  const std::vector<std::string> corpus{test::read_file(path),
                                        test::read_file(UPMOE_SOURCE_DIR "/tests/data/from_tokenize.h5")};
  EXPECT_GT(accepted_of(4'000, 2'000'000, corpus, fuzz::token_file), 10);
}

TEST(Mutations, MegatronIndices) {
  const std::vector<std::string> corpus{test::read_file(UPMOE_SOURCE_DIR "/tests/data/from_megatron.idx")};
  const int accepted = accepted_of(4'000, 3'000'000, corpus, fuzz::megatron_index);
  EXPECT_GT(accepted, 10);
  EXPECT_LT(accepted, 2'000);
}

std::vector<Manifest> manifests() {
  std::vector<Manifest> made;
  for (std::int64_t n = 1; n < 4; ++n) {
    Manifest m;
    m.run = R"({"step": 10, "samples": 80})";
    m.files = {{"shard_00000.h5", 1000, 1}, {"shard_00001.h5", 1000, 2}};
    for (std::size_t half = 0; half < 2; ++half) {
      const Box box{Shape{static_cast<std::int64_t>(half) * n, 0}, Shape{n, 3}};
      StoredTensor& t = m.tensors[{"layers.0.w", "weight"}];
      t.shape = Shape{2 * n, 3};
      t.pieces.push_back({half, "/weight/layers.0.w", 100, {box}});
    }
    made.push_back(std::move(m));
  }
  return made;
}

TEST(Mutations, ManifestsAndShardTables) {
  std::vector<std::string> whole, shards;
  for (const Manifest& m : manifests()) {
    whole.push_back(manifest_json(m));
    shards.push_back(shard_json(m));
  }
  EXPECT_GT(accepted_of(5'000, 3'000'000, whole, fuzz::manifest), 10);
  EXPECT_GT(accepted_of(5'000, 4'000'000, shards, fuzz::shard_table), 10);
}

TEST(Mutations, Indices) {
  const std::vector<std::string> corpus{
      R"({"metadata": {"total_size": 8}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})",
      R"({"weight_map": {"a": "x", "b": "y"}})"};
  EXPECT_EQ(accepted_of(2'000, 5'000'000, corpus, fuzz::index), 0);  // the files are not there
}

}  // namespace
}  // namespace upmoe

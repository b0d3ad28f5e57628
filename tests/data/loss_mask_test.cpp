// A token file's loss mask: what is read of it, what damage to it does, and what a dataset makes of it.

#include <hdf5.h>

#include <fstream>

#include "data/token_dataset.h"
#include "tests/data/token_files.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class LossMask : public TokenFiles {
 protected:
  // Every third token counts.
  static std::vector<std::uint8_t> thirds(std::size_t tokens) {
    std::vector<std::uint8_t> mask(tokens);
    for (std::size_t i = 0; i < tokens; i += 3) mask[i] = 1;
    return mask;
  }
  static std::vector<std::uint8_t> read(const TokenFile& file) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(file.num_tokens()));
    file.read_loss_mask(0, mask);
    return mask;
  }
};

TEST_F(LossMask, ReadsWhatWasWritten) {
  const std::vector<std::uint8_t> mask = thirds(40000);  // several chunks
  const Hdf5TokenFile file(write_masked("a.h5", mask)), without(write("b.h5", 40000));
  EXPECT_TRUE(file.has_loss_mask());
  EXPECT_EQ(read(file), mask);
  std::vector<std::uint8_t> part(5);
  file.read_loss_mask(16382, part);  // across a chunk's end
  EXPECT_EQ(part, (std::vector<std::uint8_t>{0, 1, 0, 0, 1}));
  file.verify();
  EXPECT_FALSE(without.has_loss_mask());
  EXPECT_NE(file.identity(), without.identity());
}

TEST_F(LossMask, NumbersOtherThanZeroAndOneAreRefused) {
  std::vector<std::uint8_t> mask = thirds(100);
  mask[60] = 2;
  const Hdf5TokenFile file(write_masked("a.h5", mask));
  EXPECT_THAT(message_of([&] { read(file); }), HasSubstr("loss_mask[60] = 2"));
  EXPECT_THAT(message_of([&] { file.verify(); }), HasSubstr("loss_mask[60] = 2"));
}

TEST_F(LossMask, DamageIsFound) {
  const fs::path path = write_masked("a.h5", thirds(20000));
  std::string bytes;
  {
    std::ifstream in(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  // The mask alone is a run of 1 0 0.
  const std::string run("\1\0\0\1\0\0\1\0\0\1\0\0", 12);
  const std::size_t at = bytes.find(run);
  ASSERT_NE(at, std::string::npos);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(at + 600));
  file.put('\0').flush();
  EXPECT_THAT(message_of([&] { read(Hdf5TokenFile(path)); }),
              HasSubstr("numbers of loss_mask 0 to 16383 are damaged"));
}

// A file that loses its mask would train on everything without a word.
TEST_F(LossMask, ALostMaskIsFound) {
  for (const auto& [names, words] :
       {std::pair{std::vector{"loss_mask"}, "checksum of its attributes"},
        std::pair{std::vector{"loss_mask_checksums"}, "'loss_mask_checksums' is missing"},
        std::pair{std::vector{"loss_mask", "loss_mask_checksums"}, "checksum of its attributes"}}) {
    const fs::path path = write_masked("a.h5", thirds(100));
    const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    for (const char* name : names) H5Ldelete(file, name, H5P_DEFAULT);
    H5Fclose(file);
    EXPECT_THAT(opening(path), HasSubstr(words)) << names.front();
  }
}

TEST_F(LossMask, ADatasetIgnoresTargetsThatDoNotCount) {
  const fs::path path = write_masked("a.h5", thirds(33));
  const TokenDataset masked({{path, 1.0, true}}, 8, false, 1, 100000),
      whole({{path, 1.0}}, 8, false, 1, 100000);
  EXPECT_TRUE(masked.masks_targets());
  EXPECT_FALSE(whole.masks_targets());
  std::vector<std::int32_t> tokens(8), targets(8), all(8);
  for (std::int64_t sample = 0; sample < 4; ++sample) {
    masked.read(sample, tokens, targets, {}, {});
    whole.read(sample, tokens, all, {}, {});
    std::int64_t counted = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      // A token's value is its place in the file.
      EXPECT_EQ(targets[i], all[i] % 3 == 0 ? all[i] : kIgnoredTarget);
      counted += all[i] % 3 == 0 ? 1 : 0;
    }
    EXPECT_EQ(masked.counted_targets(sample), counted);
    EXPECT_EQ(whole.counted_targets(sample), 8);
  }
  EXPECT_NE(masked.fingerprint(), whole.fingerprint());
}

TEST_F(LossMask, AFileWithoutOneIsRefusedWhereItIsAskedFor) {
  const fs::path path = write("a.h5", 100);
  EXPECT_THAT(message_of([&] {
                TokenDataset({{path, 1.0, true}}, 8, false, 1, 100000);
              }),
              AllOf(HasSubstr("a.h5: has no loss mask"), HasSubstr("data.valid_loss_mask"),
                    HasSubstr("--loss-mask")));
}

}  // namespace
}  // namespace upmoe

// Token files: what is read, what is refused, what damage does.

#include <hdf5.h>

#include <chrono>
#include <fstream>

#include "data/crc.h"
#include "data/sha256.h"
#include "data/token_dataset.h"
#include "tests/data/token_files.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

TEST_F(TokenFiles, ReadsWhatWasWritten) {
  const Hdf5TokenFile file(write("a.h5", 1000, {10, 11, 1000}));
  EXPECT_EQ(file.num_tokens(), 1000);
  EXPECT_EQ(file.vocab_size(), 100000);
  EXPECT_EQ(file.eos_id(), 7);
  EXPECT_EQ(file.tokenizer_sha256(), "abc");
  EXPECT_EQ(file.document_ends(), (std::vector<std::int64_t>{10, 11, 1000}));
  EXPECT_TRUE(file.checksummed());
  const std::vector<std::uint32_t> tokens = all_tokens(file);
  for (std::uint32_t i = 0; i < 1000; ++i) ASSERT_EQ(tokens[i], i);
}

// Written by data/tokenize.py: h5py stores texts with variable length.
TEST_F(TokenFiles, ReadsAFileOfTheTokenizerScript) {
  const Hdf5TokenFile file(fs::path(UPMOE_SOURCE_DIR) / "tests/data/from_tokenize.h5");
  EXPECT_FALSE(file.checksummed());  // of an earlier version, with texts of variable length
  ASSERT_FALSE(file.document_ends().empty());
  const std::vector<std::uint32_t> tokens = all_tokens(file);
  EXPECT_EQ(file.document_ends().back(), file.num_tokens());
  EXPECT_EQ(file.tokenizer_sha256().size(), 64u);
  for (const std::int64_t end : file.document_ends()) {
    EXPECT_EQ(tokens[static_cast<std::size_t>(end - 1)], static_cast<std::uint32_t>(file.eos_id()));
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
  EXPECT_THAT(opening(write("h.h5", 0)), HasSubstr("is empty"));
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

TEST_F(TokenFiles, RefusesNamesThatTakeMoreThanTheFile) {
  const fs::path long_name = write("long.h5", 100);
  const hid_t file = H5Fopen(long_name.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
  EXPECT_GE(H5Lcreate_soft("tokens", file, std::string(5000, 'x').c_str(), H5P_DEFAULT, H5P_DEFAULT), 0);
  H5Fclose(file);
  EXPECT_THAT(opening(long_name), HasSubstr("name is too long"));

  const fs::path one_name = write("one.h5", 100);
  std::fstream bytes(one_name, std::ios::in | std::ios::out | std::ios::binary);
  const std::string all(std::istreambuf_iterator<char>(bytes), {});
  const std::size_t first = all.find("SNOD") + 8, entry = 40;  // the symbols of the root group
  bytes.clear();
  bytes.seekp(static_cast<std::streamoff>(first + entry)).write(all.data() + first, 8).flush();
  EXPECT_THAT(opening(one_name), HasSubstr("one name"));
}

// One open file whose bytes are changed and put back.
class Flipped {
 public:
  explicit Flipped(const fs::path& path) : file_(path, std::ios::in | std::ios::out | std::ios::binary) {
    good_.assign(std::istreambuf_iterator<char>(file_), {});
    file_.clear();
  }
  std::size_t size() const { return good_.size(); }
  void flip(std::size_t byte, unsigned bit) { put(byte, static_cast<char>(good_[byte] ^ (1 << bit))); }
  void restore(std::size_t byte) { put(byte, good_[byte]); }

 private:
  void put(std::size_t byte, char value) {
    file_.seekp(static_cast<std::streamoff>(byte));
    file_.put(value).flush();
  }
  std::fstream file_;
  std::string good_;
};

// With checksums a flipped bit is found, or lies where nothing is read.
TEST_F(TokenFiles, DamageIsFoundOrHarmless) {
  const fs::path path = write("a.h5", 300, {100, 300});
  const std::vector<std::uint32_t> tokens = all_tokens(Hdf5TokenFile(path));
  Flipped bytes(path);
  int found = 0;
  for (std::size_t byte = 0; byte < bytes.size(); ++byte) {
    const auto bit = static_cast<unsigned>(byte * 5 % 8);  // one of each: the fuzzer has the others
    bytes.flip(byte, bit);
    try {
      const Hdf5TokenFile file(path);
      const bool same = all_tokens(file) == tokens && file.vocab_size() == 100000 && file.eos_id() == 7 &&
                        file.tokenizer_sha256() == "abc" &&
                        file.document_ends() == std::vector<std::int64_t>{100, 300};
      EXPECT_TRUE(same) << "byte " << byte << ", bit " << bit;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      ++found;
    }
    bytes.restore(byte);
  }
  EXPECT_GE(found, 300 * 4 + 2 * 8 + 4);  // tokens, ends and one checksum alone
}

// Without checksums not all damage can be found, but none may crash or fill the memory.
TEST_F(TokenFiles, DamageOfAFileWithoutChecksumsIsRefusedOrRead) {
  const fs::path path = dir_ / "old.h5";
  fs::copy_file(fs::path(UPMOE_SOURCE_DIR) / "tests/data/from_tokenize.h5", path);
  Flipped bytes(path);
  for (std::size_t byte = 0; byte < bytes.size(); ++byte)
    for (const unsigned bit : {0u, 4u, 7u}) {
      bytes.flip(byte, bit);
      try {
        Hdf5TokenFile(path).verify();
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      }
      bytes.restore(byte);
    }
}

TEST_F(TokenFiles, AChangeWhileAFileIsInUseIsAnErrorThatNamesIt) {
  const fs::path path = write("a.h5", 40000);
  const TokenDataset data({{path, 1.0}}, 8, false, 1, 100000);
  std::vector<std::int32_t> tokens(8), targets(8);
  data.read(0, tokens, targets, {}, {});
  const auto later = fs::last_write_time(path) + std::chrono::seconds(5);
  fs::last_write_time(path, later);
  EXPECT_NO_THROW(data.read(0, tokens, targets, {}, {}));  // touched: the checksums say that nothing changed
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(fs::file_size(path)) / 2);
    file << "other";
  }
  fs::last_write_time(path, later + std::chrono::seconds(5));
  EXPECT_THAT(message_of([&] {
                for (std::int64_t i = 0; i < data.num_sequences(); ++i) data.read(i, tokens, targets, {}, {});
              }),
              HasSubstr("are damaged"));
  fs::resize_file(path, 3000);
  EXPECT_THAT(message_of([&] { data.read(0, tokens, targets, {}, {}); }),
              testing::AllOf(HasSubstr(path.string()), HasSubstr("changed while it was in use")));
}

TEST_F(TokenFiles, AChangeOfAFileWithoutChecksumsIsAnError) {
  const fs::path path = dir_ / "old.h5";
  fs::copy_file(fs::path(UPMOE_SOURCE_DIR) / "tests/data/from_tokenize.h5", path);
  const Hdf5TokenFile file(path);
  file.verify();
  fs::last_write_time(path, fs::last_write_time(path) + std::chrono::seconds(5));
  EXPECT_THAT(message_of([&] { file.verify(); }), HasSubstr("changed while it was in use"));
}

// As the library writes it, and a block of the user's before it.
TEST_F(TokenFiles, ReadsEveryVersionOfTheFormat) {
  for (const H5F_libver_t low : {H5F_LIBVER_EARLIEST, H5F_LIBVER_V18, H5F_LIBVER_LATEST})
    for (const hsize_t user_block : {hsize_t{0}, hsize_t{1024}}) {
      const fs::path path = dir_ / "versions.h5";
      const hid_t access = H5Pcreate(H5P_FILE_ACCESS), create = H5Pcreate(H5P_FILE_CREATE);
      H5Pset_libver_bounds(access, low, H5F_LIBVER_LATEST);
      H5Pset_userblock(create, user_block);
      const hid_t made = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, create, access);
      const hid_t good = H5Fopen(write("good.h5", 20000).c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
      for (const char* name : {"tokens", "document_ends", "checksums"})
        H5Ocopy(good, name, made, name, H5P_DEFAULT, H5P_DEFAULT);
      for (const char* name : {"format", "vocab_size", "eos_id", "tokenizer_sha256", "checksum"}) {
        const hid_t from = H5Aopen(good, name, H5P_DEFAULT), type = H5Aget_type(from),
                    space = H5Aget_space(from);
        const hid_t to = H5Acreate2(made, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
        std::string value(H5Tget_size(type), '\0');
        H5Aread(from, type, value.data());
        H5Awrite(to, type, value.data());
        for (const hid_t id : {from, to}) H5Aclose(id);
        H5Tclose(type), H5Sclose(space);
      }
      for (const hid_t id : {good, made}) H5Fclose(id);
      H5Pclose(access), H5Pclose(create);
      const Hdf5TokenFile file(path);  // moved tokens keep their checksums
      EXPECT_TRUE(file.checksummed());
      EXPECT_EQ(all_tokens(file).back(), 19999u);
    }
}

TEST(Crc32, IsThatOfZlib) {
  EXPECT_EQ(crc32("123456789", 9), 0xcbf43926u);
  EXPECT_EQ(crc32("6789", 4, crc32("12345", 5)), 0xcbf43926u);
}

TEST(Sha256, IsThatOfTheStandard) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

}  // namespace
}  // namespace upmoe

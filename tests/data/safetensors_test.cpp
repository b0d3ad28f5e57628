// The format's own rules, and every known way to break them: each hostile file has a name.

#include "data/safetensors.h"
#include "kernels/core/normal_batch.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>

#include "kernels/core/philox.h"
#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

std::string with_length(std::uint64_t n, const std::string& rest) {
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out + rest;
}
// A file of a header and `data_bytes` bytes behind it.
std::string file_of(const std::string& header, std::size_t data_bytes = 0) {
  return with_length(header.size(), header) + std::string(data_bytes, '\x11');
}
SafetensorsHeader parse(const std::string& bytes) {
  return parse_safetensors_header(std::as_bytes(std::span(bytes)), bytes.size(), "hostile.safetensors");
}

struct Case {
  const char* name;
  std::string bytes;
  const char* message;  // part of what the error must say
};

std::string tensor(const char* name, const char* dtype, const char* shape, const char* offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, offsets);
}

std::vector<Case> broken_lengths() {
  return {
      {"empty", "", "too few"},
      {"seven_bytes", std::string(7, '\0'), "too few"},
      {"header_of_nothing", with_length(0, ""), "refused"},
      {"header_longer_than_file", with_length(100, "{}"), "header of 100 bytes"},
      {"header_one_byte_longer", with_length(3, "{}"), "header of 3 bytes"},
      {"header_of_2_to_63", with_length(std::uint64_t{1} << 63, "{}"), "truncated"},
      {"header_of_2_to_64_less_8", with_length(~std::uint64_t{7}, "{}"), "truncated"},
      {"header_of_2_to_64_less_1", with_length(~std::uint64_t{0}, "{}"), "truncated"},
      {"header_over_the_limit", with_length(100'000'001, std::string(100'000'001, ' ')), "limit 100000000"},
  };
}

std::vector<Case> broken_json() {
  return {
      {"not_json", file_of("hello"), "not JSON"},
      {"spaces_only", file_of("        "), "not JSON"},
      {"cut_off", file_of(R"({"a":{"dtype":"F32")"), "not JSON"},
      {"two_objects", file_of("{}{}"), "not JSON"},
      {"byte_after_the_object", file_of("{}x"), "not JSON"},
      {"zero_byte_after_the_object", file_of(std::string("{}\0", 3)), "not JSON"},
      {"byte_order_mark", file_of("\xef\xbb\xbf{}"), "refused"},
      {"invalid_utf8", file_of("{\"\xff\xfe\":{}}"), "not JSON"},
      {"overlong_utf8", file_of("{\"\xc0\x80\":{}}"), "not JSON"},
      {"lone_surrogate", file_of(R"({"\ud800":{}})"), "not JSON"},
      {"comment", file_of("/* */{}"), "not JSON"},
      {"a_list", file_of("[]"), "refused"},
      {"a_number", file_of("1"), "refused"},
      {"null", file_of("null"), "refused"},
      {"a_text", file_of("\"x\""), "refused"},
      {"a_number_for_a_tensor", file_of(R"({"a":1})"), "refused"},
      {"a_text_for_a_tensor", file_of(R"({"a":"b"})"), "refused"},
      {"a_list_for_a_tensor", file_of(R"({"a":[0,4]})"), "refused"},
      {"null_for_a_tensor", file_of(R"({"a":null})"), "null"},
      {"nested_bomb", file_of(std::string(1'000'000, '[')), "refused"},
      {"nested_objects", file_of(R"({"a":{"b":{"c":{}}}})"), "refused"},
      {"nested_shape", file_of("{" + tensor("a", "F32", "[[1]]", "[0,4]") + "}", 4), "list"},
      {"object_in_shape", file_of("{" + tensor("a", "F32", "[{}]", "[0,4]") + "}", 4), "object"},
      {"nested_metadata", file_of(R"({"__metadata__":{"a":{"b":"c"}}})"), "object"},
      {"number_in_metadata", file_of(R"({"__metadata__":{"a":1}})"), "number"},
      {"list_in_metadata", file_of(R"({"__metadata__":{"a":["b"]}})"), "list"},
      {"null_in_metadata", file_of(R"({"__metadata__":{"a":null}})"), "null"},
      {"metadata_twice", file_of(R"({"__metadata__":{},"__metadata__":{}})"), "twice"},
      {"metadata_key_twice", file_of(R"({"__metadata__":{"a":"1","a":"2"}})"), "twice"},
      {"metadata_is_a_text", file_of(R"({"__metadata__":"pt"})"), "refused"},
  };
}

std::vector<Case> broken_tensors() {
  const auto one = [](const char* dtype, const char* shape, const char* offsets, std::size_t bytes) {
    return file_of("{" + tensor("a", dtype, shape, offsets) + "}", bytes);
  };
  const std::string fields = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
  return {
      {"name_twice",
       file_of("{" + tensor("a", "F32", "[0]", "[0,0]") + "," + tensor("a", "F32", "[0]", "[0,0]") + "}"),
       "twice"},
      {"name_twice_escaped",
       file_of("{" + tensor("a", "F32", "[0]", "[0,0]") + "," + tensor("\\u0061", "F32", "[0]", "[0,0]") +
               "}"),
       "twice"},
      {"name_of_5000_bytes",
       file_of("{" + tensor(std::string(5000, 'n').c_str(), "F32", "[1]", "[0,4]") + "}", 4), "longer"},
      {"dtype_twice", file_of(R"({"a":{"dtype":"F32",)" + fields + "}}", 4), "twice"},
      {"unknown_field", file_of(R"({"a":{"x":"y",)" + fields + "}}", 4), "unknown field"},
      {"no_fields", file_of(R"({"a":{}})"), "exactly"},
      {"no_dtype", file_of(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), "exactly"},
      {"no_shape", file_of(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4), "exactly"},
      {"no_offsets", file_of(R"({"a":{"dtype":"F32","shape":[1]}})", 4), "exactly"},
      {"unknown_dtype", one("F31", "[1]", "[0,4]", 4), "unknown dtype"},
      {"lower_case_dtype", one("f32", "[1]", "[0,4]", 4), "unknown dtype"},
      {"empty_dtype", one("", "[1]", "[0,4]", 4), "unknown dtype"},
      {"dtype_is_a_number", file_of(R"({"a":{"dtype":32,"shape":[1],"data_offsets":[0,4]}})", 4), "number"},
      {"dtype_is_a_list", file_of(R"({"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}})", 4), "list"},
      {"shape_is_a_text", file_of(R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", 4), "text"},
      {"shape_is_a_number", file_of(R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", 4), "number"},
      {"shape_of_texts", one("F32", R"(["1"])", "[0,4]", 4), "text"},
      {"shape_is_null", one("F32", "null", "[0,4]", 4), "null"},
      {"fraction_1_0", one("F32", "[1.0]", "[0,4]", 4), "not a count"},
      {"exponent_1e3", one("F32", "[1]", "[0,4e0]", 4), "not a count"},
      {"negative_dim", one("F32", "[-1]", "[0,4]", 4), "negative"},
      {"negative_offset", one("F32", "[1]", "[-4,0]", 4), "negative"},
      {"minus_zero", one("F32", "[0]", "[-0,0]", 0), "negative"},
      {"dim_beyond_2_to_64", one("F32", "[18446744073709551616]", "[0,4]", 4), "not a count"},
      {"offset_beyond_2_to_64", one("F32", "[1]", "[0,99999999999999999999]", 4), "not a count"},
      {"dim_of_2_to_63", one("F32", "[9223372036854775808]", "[0,4]", 4), "2^62"},
      {"shape_product_wraps_to_zero", one("F32", "[4294967296,4294967296]", "[0,0]", 0), "overflows"},
      {"shape_product_wraps_to_size", one("U8", "[4611686018427387904,4]", "[0,0]", 0), "overflows"},
      {"bits_overflow", one("F64", "[4611686018427387904]", "[0,8]", 8), "overflows"},
      {"seventeen_dims", one("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]", 4), "16 dims"},
      {"half_a_byte", one("F4", "[1]", "[0,1]", 1), "whole bytes"},
      {"six_bit_rest", one("F6_E2M3", "[3]", "[0,3]", 3), "whole bytes"},
      {"one_offset", one("F32", "[1]", "[4]", 4), "two numbers"},
      {"three_offsets", one("F32", "[1]", "[0,4,8]", 4), "two numbers"},
      {"no_offset", one("F32", "[0]", "[]", 0), "two numbers"},
      {"offsets_backwards", one("F32", "[1]", "[4,0]", 4), "begin at 0"},
      {"size_too_small", one("F32", "[2]", "[0,4]", 4), "need 8"},
      {"size_too_large", one("F32", "[1]", "[0,8]", 8), "need 4"},
      {"scalar_of_two", one("F32", "[]", "[0,8]", 8), "need 4"},
  };
}

std::vector<Case> broken_coverage() {
  const auto two = [](const char* first, const char* second, std::size_t bytes) {
    return file_of("{" + tensor("a", "F32", "[1]", first) + "," + tensor("b", "F32", "[1]", second) + "}",
                   bytes);
  };
  return {
      {"overlap", two("[0,4]", "[2,6]", 6), "without gap or overlap"},
      {"same_place", two("[0,4]", "[0,4]", 4), "without gap or overlap"},
      {"hole", two("[0,4]", "[8,12]", 12), "without gap or overlap"},
      {"hole_at_the_start", two("[4,8]", "[8,12]", 12), "without gap or overlap"},
      {"byte_after_the_end", two("[0,4]", "[4,8]", 9), "9 bytes of data"},
      {"byte_missing", two("[0,4]", "[4,8]", 7), "truncated"},
      {"data_missing", two("[0,4]", "[4,8]", 0), "truncated"},
      {"data_without_tensors", file_of("{}", 1), "1 bytes of data"},
      {"end_at_2_to_64", file_of("{" + tensor("a", "U8", "[4]", "[0,18446744073709551615]") + "}", 4),
       "need 4"},
  };
}

TEST(Safetensors, HostileFilesAreRefusedByName) {
  for (const auto& cases : {broken_lengths(), broken_json(), broken_tensors(), broken_coverage()})
    for (const Case& c : cases) {
      try {
        parse(c.bytes);
        ADD_FAILURE() << c.name << " was accepted";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::kBadInput) << c.name;
        EXPECT_NE(std::string(e.what()).find(c.message), std::string::npos) << c.name << ": " << e.what();
        EXPECT_NE(std::string(e.what()).find("hostile.safetensors"), std::string::npos)
            << c.name << ": " << e.what();
        EXPECT_LT(std::strlen(e.what()), 6000u) << c.name;
      }
    }
}

TEST(Safetensors, LegalFilesAreAccepted) {
  EXPECT_TRUE(parse(file_of("{}")).entries.empty());
  EXPECT_EQ(parse(file_of("  \n{}\t  ")).data_begin, 16u);  // white space around the object
  EXPECT_EQ(parse(file_of(R"({"__metadata__":{"format":"pt"}})")).metadata.at("format"), "pt");
  const SafetensorsHeader scalar = parse(file_of("{" + tensor("s", "F32", "[]", "[0,4]") + "}", 4));
  EXPECT_TRUE(scalar.entries.at(0).shape.empty());
  // Written in another order than the data; zero-byte tensors at any place, even several at one.
  const SafetensorsHeader mixed = parse(
      file_of("{" + tensor("b", "BF16", "[3]", "[8,14]") + "," + tensor("a", "I64", "[1]", "[0,8]") + "," +
                  tensor("z1", "F32", "[0,7]", "[8,8]") + "," + tensor("z2", "F32", "[0]", "[8,8]") + "," +
                  tensor("z3", "F32", "[9223372036854,0]", "[14,14]") + "}",
              14));
  EXPECT_EQ(mixed.entries.front().name, "a");
  EXPECT_EQ(mixed.entries.back().name, "z3");
  EXPECT_EQ(parse(file_of("{" + tensor("q", "F4", "[3,2]", "[0,3]") + "}", 3)).entries.size(), 1u);
  EXPECT_EQ(parse(file_of("{" + tensor("", "U8", "[1]", "[0,1]") + "}", 1)).entries.size(),
            1u);  // an empty name
  for (const char* dtype : {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"})
    EXPECT_NO_THROW(parse(file_of("{" + tensor("a", dtype, "[2]", "[0,2]") + "}", 2))) << dtype;
  for (const char* dtype : {"C64", "F64", "I64", "U64"})
    EXPECT_NO_THROW(parse(file_of("{" + tensor("a", dtype, "[1]", "[0,8]") + "}", 8))) << dtype;
}

class Directory : public testing::Test {
 protected:
  test::TemporaryDirectory folder;
  fs::path dir = folder.path();
};

TEST_F(Directory, RoundTrip) {
  std::vector<float> f(15);
  for (std::size_t i = 0; i < f.size(); ++i) f[i] = normal_at(1, i);
  f[3] = std::numeric_limits<float>::quiet_NaN();  // values are never judged
  std::vector<bf16> b(7, to_bf16(1.5f));
  std::vector<std::int64_t> n{1, -2, std::int64_t{1} << 60};
  const fs::path path = dir / "model.safetensors";
  write_safetensors(path, {{"f", host_view(f.data(), {3, 5})},
                           {"b \"\n\xc3\xa4", host_view(b.data(), {7})},
                           {"n", host_view(n.data(), {3})},
                           {"empty", host_view(f.data(), {0, 4})},
                           {"scalar", host_view(f.data(), Shape{})}});
  EXPECT_FALSE(fs::exists(path.string() + ".tmp"));
  const SafetensorsFile file(path);
  EXPECT_EQ(file.header().data_begin % 8, 0u);
  EXPECT_EQ(file.header().metadata.at("format"), "pt");
  EXPECT_EQ(file.header().entries.size(), 5u);
  EXPECT_EQ(file.find("nothing"), nullptr);
  const auto read = [&](const char* name, auto& out) {
    const SafetensorsEntry* e = file.find(name);
    ASSERT_NE(e, nullptr) << name;
    ASSERT_EQ(e->end - e->begin, std::as_writable_bytes(std::span(out)).size());
    file.read(*e, 0, std::as_writable_bytes(std::span(out)));
  };
  std::vector<float> f2(15);
  std::vector<bf16> b2(7);
  std::vector<std::int64_t> n2(3);
  read("f", f2);
  read("b \"\n\xc3\xa4", b2);
  read("n", n2);
  EXPECT_EQ(std::memcmp(f.data(), f2.data(), 60), 0);
  EXPECT_EQ(b2, b);
  EXPECT_EQ(n2, n);
  std::vector<std::byte> piece(8);
  file.read(*file.find("f"), 4, piece);
  EXPECT_EQ(std::memcmp(piece.data(), f.data() + 1, 8), 0);
  EXPECT_THROW(file.read(*file.find("f"), 56, piece), Error);
  EXPECT_THROW(file.read(*file.find("f"), ~std::uint64_t{0} - 3, piece), Error);  // offset + size wraps round
}

TEST_F(Directory, WhatIsNoRegularFileIsRefused) {
  EXPECT_THROW(SafetensorsFile(dir / "nothing"), Error);
  EXPECT_THROW(SafetensorsFile{dir}, Error);
  EXPECT_THROW(SafetensorsFile("/dev/zero"), Error);
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsFile(dir / "fifo"), Error);  // and does not wait for a writer
}

TEST_F(Directory, HostileFilesOnDisk) {
  for (const auto& cases : {broken_lengths(), broken_coverage()})
    for (const Case& c : cases) {
      const fs::path path = dir / c.name;
      std::ofstream(path, std::ios::binary) << c.bytes;
      EXPECT_THROW(SafetensorsFile{path}, Error) << c.name;
      fs::remove(path);
    }
  // A sparse file of 8 TiB with a small header costs nothing to refuse.
  std::ofstream(dir / "sparse", std::ios::binary)
      << file_of("{" + tensor("a", "F32", "[1]", "[0,4]") + "}", 4);
  fs::resize_file(dir / "sparse", std::uintmax_t{1} << 42);
  EXPECT_THROW(SafetensorsFile(dir / "sparse"), Error);
}

TEST(Safetensors, OwnHeadersAreParsedBack) {
  std::vector<SafetensorsEntry> entries;
  for (std::int64_t i = 0; i < 500; ++i)
    entries.push_back(
        {fmt::format("model.layers.{}.weight", i), i % 2 == 0 ? "BF16" : "F32", {i % 7, i % 5 + 1}, 0, 0});
  const std::string header = make_safetensors_header(entries, {{"format", "pt"}});
  EXPECT_EQ(header.size() % 8, 0u);
  const std::string bytes = header + std::string(entries.back().end, 'x');
  const SafetensorsHeader parsed = parse(bytes);
  ASSERT_EQ(parsed.entries.size(), entries.size());
  for (const SafetensorsEntry& e : entries) {
    const auto same = [&](const SafetensorsEntry& p) {
      return p.name == e.name && p.dtype == e.dtype && p.shape == e.shape && p.begin == e.begin &&
             p.end == e.end;
    };
    EXPECT_EQ(std::count_if(parsed.entries.begin(), parsed.entries.end(), same), 1) << e.name;
  }
}

}  // namespace
}  // namespace upmoe

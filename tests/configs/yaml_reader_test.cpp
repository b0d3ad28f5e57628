// What YAML would let pass in silence, and inputs made to take long.

#include "configs/yaml_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>

#include "configs/nearest_name.h"
#include "configs/schema.h"
#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

std::vector<std::string> problems_in(std::string_view yaml) {
  Problems problems;
  parse_yaml(yaml, "f", problems);
  return problems.list();
}

TEST(YamlReader, TreeWithPositions) {
  Problems problems;
  const YamlNode root = parse_yaml("a: 1\nb:\n  - x\n  - 'y'\n  -\n", "f.yaml", problems);
  ASSERT_THAT(problems.list(), IsEmpty());
  ASSERT_EQ(root.kind, YamlNode::Kind::kMap);
  ASSERT_THAT(root.entries, SizeIs(2));
  EXPECT_EQ(root.entries[0].first.text, "a");
  EXPECT_EQ(root.entries[0].second.where, "f.yaml:1:4");
  const YamlNode& list = root.entries[1].second;
  ASSERT_THAT(list.items, SizeIs(3));
  EXPECT_EQ(list.items[0].where, "f.yaml:3:5");
  EXPECT_FALSE(list.items[0].quoted);
  EXPECT_TRUE(list.items[1].quoted);
  EXPECT_EQ(list.items[2].kind, YamlNode::Kind::kNull);
}

TEST(YamlReader, RefusesWhatWouldPassInSilence) {
  EXPECT_THAT(problems_in("a: 1\nb: 2\na: 3\n"),
              ElementsAre("f:3:1: the key 'a' is given twice, first at f:1:1"));
  EXPECT_THAT(problems_in("s: {x: 1, x: 2}\n"), ElementsAre(HasSubstr("'x' is given twice")));
  EXPECT_THAT(problems_in("a: &d {x: 1}\nb: {<<: *d}\n"), ElementsAre(HasSubstr("merge keys")));
  EXPECT_THAT(problems_in("a: !!str 5\n"), ElementsAre(HasSubstr("tag")));
  EXPECT_THAT(problems_in("a: !x [1]\n"), ElementsAre(HasSubstr("tag")));
  EXPECT_THAT(problems_in("a:\n\tb: 1\n"), ElementsAre(HasSubstr("line 2 is indented with a tab")));
  EXPECT_THAT(problems_in("a: {b: 1,\n\t c: [}\n"), ElementsAre(HasSubstr("line 2 is indented with a tab")));
  EXPECT_THAT(problems_in("a: [*x*]\n"), ElementsAre(HasSubstr("needs quotes")));
  EXPECT_THAT(problems_in("a: [@x]\n"), ElementsAre(HasSubstr("needs quotes")));
  EXPECT_THAT(problems_in("a: b: 1\n"), ElementsAre(HasSubstr("one key a line")));
  EXPECT_THAT(problems_in("? [1, 2]\n: 3\n"), ElementsAre(HasSubstr("plain word")));
  EXPECT_THAT(problems_in("a: 1\n---\nb: 2\n"), ElementsAre(HasSubstr("more than one")));
  EXPECT_THAT(problems_in(""), ElementsAre("f: the file is empty"));
  EXPECT_THAT(problems_in("\xff\xfe"
                          "a"),
              ElementsAre(HasSubstr("UTF-16")));
  EXPECT_THAT(problems_in(std::string_view("a\0:\0", 4)), ElementsAre(HasSubstr("NUL")));
  EXPECT_THAT(problems_in("a: \xc3("), ElementsAre(HasSubstr("UTF-8")));
  EXPECT_THAT(problems_in("a: [1\n"), ElementsAre(HasSubstr("not valid YAML")));
  EXPECT_THAT(problems_in("a: b: c\n"), ElementsAre(HasSubstr("f:1:")));
  EXPECT_THAT(problems_in("a: *nowhere\n"), ElementsAre(HasSubstr("not valid YAML")));
  EXPECT_THAT(problems_in("\xef\xbb\xbf"
                          "a: 1\n"),
              IsEmpty());  // a UTF-8 mark is harmless
  EXPECT_THAT(problems_in("a: &x 1\nb: *x\n"), IsEmpty());
}

TEST(YamlReader, BoundsTheWork) {
  std::string bomb = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 10; ++i) {
    bomb += fmt::format(
        "a{0}: &a{0} [*a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}]\n", i, i - 1);
  }
  EXPECT_THAT(problems_in(bomb), ElementsAre(HasSubstr("aliases counted as what they stand for")));
  EXPECT_THAT(problems_in("a: &a [*a]\n"), SizeIs(1));
  EXPECT_THAT(problems_in("a: " + std::string(40, '[') + std::string(40, ']')),
              ElementsAre(HasSubstr("deeper")));
  EXPECT_THAT(problems_in("a: " + std::string(5000, '[')), SizeIs(1));
  EXPECT_THAT(problems_in(std::string((1u << 20) + 1, ' ')), ElementsAre(HasSubstr("at most 1048576")));
  std::string keys, flow = "a: [";
  for (int i = 0; i < 50000; ++i) keys += fmt::format("k{}: 1\n", i);
  EXPECT_THAT(problems_in(keys), ElementsAre(HasSubstr("more than 1000 keys")));
  while (flow.size() < 1000000) flow += "1,";
  EXPECT_THAT(problems_in(flow + "1]"), ElementsAre(HasSubstr("more than 100000 values")));
}

// A megabyte of each kind of character is read or refused in seconds, whatever it is.
TEST(YamlReader, NoCharacterTakesLong) {
  for (const char* unit :
       {"a",   "[",  "{", "- ", "? ", ": ", "a: ", "\"", "'", "#",     "&a ",  "*a ",  "!t ", "|\n",
        ">\n", "\n", " ", "\t", "%",  "@",  "`",   ",",  "]", "---\n", "a:\n", "? - ", "\\",  "<<: "}) {
    std::string text;
    while (text.size() < 200000) text += unit;
    const auto begin = std::chrono::steady_clock::now();
    problems_in(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_LT(seconds.count(), 20.0) << unit;
  }
}

TEST(YamlReader, QuotedTextsComeBack) {
  for (const std::string text : {"plain/path-1.h5",
                                 "with space",
                                 "",
                                 "null",
                                 "~",
                                 "true",
                                 "a: b",
                                 "#x",
                                 "[x]",
                                 "'",
                                 "\"",
                                 "back\\slash",
                                 "line\nbreak",
                                 "tab\t",
                                 "\x7f\x01",
                                 "naïve 日本語",
                                 "- x",
                                 "0777",
                                 "*a",
                                 "a ",
                                 "-"}) {
    Problems problems;
    const YamlNode root =
        parse_yaml("k: " + yaml_quoted(text) + "\nl: [" + yaml_quoted(text) + "]\n", "f", problems);
    ASSERT_THAT(problems.list(), IsEmpty()) << text;
    EXPECT_EQ(root.entries[0].second.kind, YamlNode::Kind::kScalar) << text;
    EXPECT_EQ(root.entries[0].second.text, text);
    EXPECT_EQ(root.entries[1].second.items.at(0).text, text);
  }
}

TEST(YamlReader, Utf8) {
  for (const char* good : {"", "ascii", "é", "日", "🙂", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf"})
    EXPECT_TRUE(is_valid_utf8(good));
  for (const char* bad : {"\x80", "\xc3", "\xc0\xaf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                          "\xf4\x90\x80\x80", "\xff", "a\xe6\x97"}) {
    EXPECT_FALSE(is_valid_utf8(bad));
  }
}

TEST(YamlReader, Files) {
  EXPECT_THROW(read_text_file("/nonexistent/file.yaml"), Error);
  const test::TemporaryDirectory folder;
  EXPECT_THROW(read_text_file(folder.path()), Error);
  const std::filesystem::path path = folder.path() / "large";
  std::ofstream(path) << std::string(101, 'x');
  EXPECT_EQ(read_text_file(path, 101).size(), 101u);
  EXPECT_THROW(read_text_file(path, 100), Error);
}

TEST(YamlReader, ProblemsAreThrownTogether) {
  Problems problems;
  problems.throw_if_any(ExitCode::kUsage, "f");
  problems.add("f:1:2", "first");
  try {
    problems.throw_if_any(ExitCode::kUsage, "f");
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "f:1:2: first");
  }
  problems.add("second");
  try {
    problems.throw_if_any(ExitCode::kUsage, "f");
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "f: 2 problems\n  f:1:2: first\n  second");
  }
}

TEST(Schema, EditDistance) {
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("same", "same"), 0);
}

}  // namespace
}  // namespace upmoe

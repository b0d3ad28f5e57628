// A file beside a training loses nothing while the disk refuses it, and no record stands half in it afterwards.

#include "trainer/appended_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <fstream>
#include <iterator>
#include <memory>

#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

std::string content(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// As a full disk does, the limit of a file's size lets a part of a record through.
class Limited {
 public:
  explicit Limited(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit now = before_;
    now.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~Limited() { setrlimit(RLIMIT_FSIZE, &before_); }
  Limited(const Limited&) = delete;

 private:
  rlimit before_{};
};

TEST(AppendedFile, WritesWhatWasRefusedWhenItCanAgain) {
  const test::TemporaryDirectory folder;
  const std::filesystem::path path = folder.path() / "records";
  std::ofstream(path) << "before\n";
  AppendedFile file(path, "records");
  file.append("first\n");
  const std::string whole = "before\nfirst\n", second(50'000, '2');
  EXPECT_EQ(content(path), whole);
  testing::internal::CaptureStderr();
  {
    const Limited limit(30'000);  // what is said above goes to a file as well
    for (const std::string& record : {second, std::string("third\n")}) file.append(record);
    EXPECT_TRUE(content(path).starts_with(whole));
  }
  file.append("fourth\n");
  file.append("fifth\n");
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(content(path), whole + second + "third\nfourth\nfifth\n");
  EXPECT_NE(said.find("records wait until it can"), std::string::npos) << said;
  EXPECT_EQ(said.find("records wait", said.find("records wait") + 1), std::string::npos) << "once: " << said;
  EXPECT_NE(said.find("nothing is lost"), std::string::npos) << said;
}

TEST(AppendedFile, WhatIsLeftAtItsEndIsTriedAndTold) {
  const test::TemporaryDirectory folder;
  const std::filesystem::path path = folder.path() / "records";
  const std::string first = "first\n", second(50'000, '2');
  for (const bool room : {true, false}) {
    std::ofstream(path) << first;
    testing::internal::CaptureStderr();
    auto limit = std::make_unique<Limited>(30'000);
    {
      AppendedFile file(path, "records");
      file.append(second);
      if (room) limit.reset();
    }
    limit.reset();
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_EQ(content(path), room ? first + second : first);
    EXPECT_EQ(said.find("the last 50000 bytes of records are lost") == std::string::npos, room) << said;
  }
}

TEST(AppendedFile, APlaceThatIsNoneEndsNothing) {
  const test::TemporaryDirectory folder;
  AppendedFile file(folder.path() / "gone" / "records", "records");
  file.append("first\n");
  std::filesystem::create_directory(folder.path() / "gone");
  file.append("second\n");
  EXPECT_EQ(content(folder.path() / "gone" / "records"), "first\nsecond\n");
}

}  // namespace
}  // namespace upmoe

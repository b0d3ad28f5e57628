// Output that appears complete or not at all: what is refused, whose files are touched, two jobs at once,
// jobs that were killed, disks that refuse.

#include "data/staged_directory.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <fstream>
#include <functional>
#include <set>

#include "data/folder.h"
#include "tests/support/temporary_directory.h"

namespace upmoe::test {
namespace {

namespace fs = std::filesystem;

std::string text_of(const fs::path& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}
void put(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}
std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

class Staged : public ::testing::Test {
 protected:
  // What is there, as paths below the folder.
  std::set<std::string> all() const {
    std::set<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(root))
      names.insert(entry.path().lexically_relative(root).string());
    return names;
  }
  static void expect_refused(ExitCode code, const std::string& words, const std::function<void()>& body) {
    try {
      body();
      ADD_FAILURE() << "was not refused: " << words;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  }
  // `body` in a process of its own, which then dies without any clean-up; its exit status.
  static int in_child(const std::function<void()>& body) {
    const pid_t child = fork();
    if (child == 0) {
      try {
        body();
        _exit(0);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        _exit(1);
      }
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  TemporaryDirectory folder;
  fs::path root = fs::canonical(folder.path()), to = root / "out";
};

TEST_F(Staged, IsThereAfterCommitAndOnlyThen) {
  {
    StagedDirectory stage(root / "a" / "b" / "out", {});
    stage.create();
    put(stage.path() / "file", "x");
    EXPECT_FALSE(fs::exists(root / "a" / "b" / "out"));
    stage.commit();
  }
  EXPECT_EQ(all(), (std::set<std::string>{"a", "a/b", "a/b/out", "a/b/out/file"}));
}

TEST_F(Staged, WhatFailsLeavesNothing) {
  {
    StagedDirectory stage(root / "a" / "b" / "out", {});
    stage.create();
    put(stage.path() / "file", "x");
    put(stage.path() / "folder/shard", "x");
  }
  EXPECT_TRUE(all().empty());
  put(root / "a" / "mine", "x");
  { StagedDirectory stage(root / "a" / "b" / "out", {}); }
  EXPECT_EQ(all(), (std::set<std::string>{"a", "a/mine"}));
  { StagedFile file(root / "a" / "logits"); }
  EXPECT_EQ(all(), (std::set<std::string>{"a", "a/mine"}));
}

TEST_F(Staged, FilesOfSomebodyElseAreNeverTouched) {
  put(root / "out.tmp" / "mine" / "thesis.tex", "thesis");
  {
    StagedDirectory stage(to, {});
    stage.create();
    stage.commit();
  }
  EXPECT_EQ(text_of(root / "out.tmp" / "mine" / "thesis.tex"), "thesis");
  fs::remove(to);
  put(root / "out.upmoe-partial" / "part-1" / "thesis.tex", "thesis");
  expect_refused(ExitCode::kUsage, "move it away", [&] { StagedDirectory stage(to, {}); });
  fs::remove_all(root / "out.upmoe-partial");
  put(root / "out.upmoe-partial", "thesis");  // a file
  expect_refused(ExitCode::kUsage, "move it away", [&] { StagedDirectory stage(to, {}); });
  fs::remove(root / "out.upmoe-partial");
  fs::create_directory_symlink(root / "out.tmp", root / "out.upmoe-partial");
  expect_refused(ExitCode::kUsage, "move it away", [&] { StagedDirectory stage(to, {}); });
  EXPECT_EQ(text_of(root / "out.tmp" / "mine" / "thesis.tex"), "thesis");
}

TEST_F(Staged, BesideALeftOverNothingElseIsCleared) {
  ASSERT_EQ(in_child([&] {
              auto* stage = new StagedDirectory(to, {});  // never destroyed
              stage->create();
            }),
            0);
  put(root / "out.upmoe-partial" / "thesis.tex", "thesis");
  {
    StagedDirectory stage(to, {});
    stage.create();
    stage.commit();
  }
  EXPECT_EQ(all(), (std::set<std::string>{"out", "out.upmoe-partial", "out.upmoe-partial/thesis.tex"}));
}

TEST_F(Staged, TheSecondJobWithOneTargetSaysSo) {
  StagedDirectory first(to, {});
  first.create();
  put(first.path() / "file", "first");
  EXPECT_EQ(in_child([&] {
              expect_refused(ExitCode::kUsage, "being written by another job (process ",
                             [&] { StagedDirectory second(to, {}); });
              if (HasFailure()) _exit(1);
            }),
            0);
  first.commit();
  EXPECT_EQ(text_of(to / "file"), "first");
  StagedFile file(root / "logits");
  expect_refused(ExitCode::kUsage, "being written by another job",
                 [&] { StagedFile second(root / "logits"); });
}

TEST_F(Staged, WhatAKilledJobLeftIsCleared) {
  EXPECT_EQ(in_child([&] {
              StagedDirectory stage(to, {});
              stage.create();
              put(stage.path() / "file", "cut short");
              StagedFile file(root / "logits");
              file.write(bytes_of("cut short"));
              raise(SIGKILL);
            }),
            128 + SIGKILL);
  EXPECT_FALSE(fs::exists(to));
  EXPECT_GT(all().size(), 2u);
  {
    StagedDirectory stage(to, {});
    stage.create();
    StagedFile file(root / "logits");
    file.write(bytes_of("new"));
    file.commit();
    stage.commit();
  }
  EXPECT_EQ(all(), (std::set<std::string>{"out", "logits"}));
  EXPECT_EQ(text_of(root / "logits"), "new");
}

TEST_F(Staged, RefusesPlacesThatCannotBe) {
  const fs::path model = root / "model";
  put(model / "config.json", "{}");
  put(root / "file", "x");
  put(root / "full" / "mine", "x");
  fs::create_directory(root / "empty");
  fs::create_directory_symlink(model, root / "link");
  fs::create_directory_symlink(root / "nowhere", root / "dangling");
  const std::vector<std::pair<fs::path, std::string>> cases{{model, "overlap"},
                                                            {model / "out", "overlap"},
                                                            {model / "x" / ".." / "out", "overlap"},
                                                            {root, "overlap"},
                                                            {root / "link" / "out", "overlap"},
                                                            {root / "dangling", "does not exist"},
                                                            {root / "file", "is no folder"},
                                                            {root / "file" / "below", "is a file"},
                                                            {root / "full", "not empty"},
                                                            {"/proc", "mount point"}};
  for (const auto& [place, words] : cases) {
    expect_refused(ExitCode::kUsage, words, [&] { StagedDirectory stage(place, {model}); });
    expect_refused(ExitCode::kUsage, words, [&] { check_new_directory(place.string() + "/", {model}); });
  }
  const fs::path here = fs::current_path();
  fs::current_path(root / "empty");
  expect_refused(ExitCode::kUsage, "empty name", [&] { StagedDirectory stage("", {model}); });
  expect_refused(ExitCode::kUsage, "empty name", [&] { StagedFile file("", {model}); });
  for (const char* place : {".", "./", "../empty/"})
    expect_refused(ExitCode::kUsage, "working directory", [&] { StagedDirectory stage(place, {model}); });
  fs::current_path(here);
  // The source may not lie where the output is prepared.
  fs::rename(model, root / "out.upmoe-partial");
  expect_refused(ExitCode::kUsage, "", [&] { StagedDirectory stage(to, {root / "out.upmoe-partial"}); });
  EXPECT_TRUE(fs::exists(root / "out.upmoe-partial" / "config.json"));
}

TEST_F(Staged, AFileReplacesNoInputFolderOrDevice) {
  put(root / "model" / "model.safetensors", "weights");
  put(root / "tokens.h5", "tokens");
  fs::create_directory(root / "folder");
  const std::vector<fs::path> inputs{root / "model", root / "tokens.h5"};
  const std::vector<std::pair<fs::path, std::string>> cases{{root / "model" / "model.safetensors", "overlap"},
                                                            {root / "tokens.h5", "overlap"},
                                                            {root / "folder", "no regular file"},
                                                            {"/dev/null", "no regular file"},
                                                            {root / "tokens.h5" / "below", "is a file"}};
  for (const auto& [place, words] : cases)
    expect_refused(ExitCode::kUsage, words, [&] { StagedFile file(place, inputs); });
  expect_refused(ExitCode::kBadInput, "make it first",
                 [&] { StagedFile file(root / "no" / "file", inputs); });
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  EXPECT_EQ(text_of(root / "model" / "model.safetensors"), "weights");
}

TEST_F(Staged, ATargetThatAppearsMeanwhileIsLeftAsItIs) {
  {
    StagedDirectory stage(to, {});
    stage.create();
    put(to / "mine", "x");
    expect_refused(ExitCode::kBadInput, "left as it is", [&] { stage.commit(); });
  }
  EXPECT_EQ(all(), (std::set<std::string>{"out", "out/mine"}));
}

// A folder that may be written and not read cannot be brought to disk.
TEST_F(Staged, ANameThatIsNotConfirmedIsNoFailure) {
  const fs::path blind = root / "blind";
  fs::create_directory(blind);
  ASSERT_EQ(::chmod(blind.c_str(), 0333), 0);
  ASSERT_EQ(::chmod(root.c_str(), 0755), 0);
  EXPECT_EQ(in_child([&] {
              if (::getuid() == 0 && ::setuid(65534) != 0) _exit(2);
              StagedDirectory stage(blind / "out", {});
              stage.create();
              stage.commit();
              StagedFile file(blind / "logits");
              file.commit();
            }),
            0);
  EXPECT_TRUE(fs::exists(blind / "out"));
  EXPECT_TRUE(fs::exists(blind / "logits"));
}

TEST_F(Staged, AFolderThatCannotBeWrittenIsBadInput) {
  const fs::path closed = root / "closed";
  fs::create_directory(closed);
  ASSERT_EQ(::chmod(closed.c_str(), 0555), 0);
  ASSERT_EQ(::chmod(root.c_str(), 0755), 0);
  EXPECT_EQ(in_child([&] {
              if (::getuid() == 0 && ::setuid(65534) != 0) _exit(2);
              for (const char* name : {"out", "a/out"})
                expect_refused(ExitCode::kBadInput, "Permission denied",
                               [&] { StagedDirectory stage(closed / name, {}); });
              expect_refused(ExitCode::kBadInput, "Permission denied",
                             [&] { StagedFile file(closed / "logits"); });
              if (HasFailure()) _exit(1);
            }),
            0);
}

TEST_F(Staged, AFullDiskLeavesNothing) {
  const fs::path disk = root / "disk";
  fs::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=64k") != 0) GTEST_SKIP() << "no tmpfs can be mounted";
  const std::string much(1 << 20, 'x');
  expect_refused(ExitCode::kBadInput, "No space left", [&] {
    StagedFile file(disk / "logits");
    file.write(bytes_of(much));
  });
  expect_refused(ExitCode::kBadInput, "are needed", [&] { require_free_space(disk / "a" / "b", 1 << 20); });
  EXPECT_TRUE(fs::is_empty(disk));
  EXPECT_EQ(umount(disk.c_str()), 0);
}

}  // namespace
}  // namespace upmoe::test

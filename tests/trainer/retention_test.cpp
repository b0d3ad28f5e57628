// Which checkpoints stay: by what they are worth, not by their number. And one job per run directory.

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "data/folder.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/data/stores.h"
#include "trainer/checkpoint_keeper.h"
#include "trainer/run_directory.h"
#include "trainer/run_lock.h"
#include "trainer/shared_folder.h"

namespace upmoe::test {
namespace {

class Retention : public Stores {
 protected:
  void make(std::int64_t step) { write_test_store(checkpoint_path(root, step), 1); }
  void cut_short(std::int64_t step) { fs::resize_file(checkpoint_path(root, step) / "shard_00000.h5", 100); }
  // What a start finds, on one rank.
  CheckpointChoice choose() const {
    const auto self = make_self_communicator();
    return choose_checkpoint(root, *self);
  }
  // What a run does at each save.
  void save(CheckpointKeeper& keeper, std::int64_t step, bool durable = true) {
    keeper.make_way(step);
    make(step);
    keeper.wrote(step, durable);
  }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const fs::path& entry : entries_of(root)) all.push_back(entry.filename().string());
    return all;
  }
};

TEST_F(Retention, TheNewestGoodCheckpointIsNeverRemoved) {
  for (const std::int64_t step : {10, 20, 30}) make(step);
  cut_short(20);
  cut_short(30);
  CheckpointKeeper keeper(root, 2);
  keeper.remember(choose());
  EXPECT_EQ(names(),
            (std::vector<std::string>{"step_00000010", "step_00000020.aside", "step_00000030.aside"}));
  for (const std::int64_t step : {12, 15, 18}) {
    save(keeper, step);
    EXPECT_NO_THROW(open_and_verify(checkpoint_path(root, step)));
  }
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000015", "step_00000018", "step_00000020.aside",
                                               "step_00000030.aside"}));
}

// As a start finds it that could not set the newer ones aside, or whose own became unusable while it ran.
TEST_F(Retention, UnusableOnesDoNotCount) {
  for (const std::int64_t step : {10, 12}) make(step);
  CheckpointKeeper keeper(root, 2);
  keeper.remember(choose());
  for (const std::int64_t step : {20, 30, 40}) {
    make(step);
    cut_short(step);
  }
  fs::create_directory(checkpoint_path(root, 50));  // empty
  save(keeper, 15);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000012", "step_00000015", "step_00000020",
                                               "step_00000030", "step_00000040", "step_00000050"}));
}

// The newest two of all stay, a milestone among them; older milestones beside them, and through another start.
TEST_F(Retention, MilestonesStayBesideTheNewest) {
  CheckpointKeeper first(root, 2, 30);
  for (const std::int64_t step : {10, 20, 30, 40}) save(first, step);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000030", "step_00000040"}));
  save(first, 50);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000030", "step_00000040", "step_00000050"}));
  CheckpointKeeper second(root, 2, 30);
  second.remember(choose());
  for (const std::int64_t step : {60, 70, 80}) save(second, step);
  EXPECT_EQ(names(),
            (std::vector<std::string>{"step_00000030", "step_00000060", "step_00000070", "step_00000080"}));
  save(second, 90);
  EXPECT_EQ(names(),
            (std::vector<std::string>{"step_00000030", "step_00000060", "step_00000080", "step_00000090"}));
}

// Whose turn it would be when the two before it are those that are known to be good.
TEST_F(Retention, AMilestoneOfAnothersHandStays) {
  make(10);
  CheckpointKeeper keeper(root, 2, 20);
  keeper.remember(choose());
  make(20);
  save(keeper, 15);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000010", "step_00000015", "step_00000020"}));
}

// As a full disk has it: what may go is what is no milestone, and for the last save all of it but the newest good one.
TEST_F(Retention, AFullDiskLeavesMilestones) {
  CheckpointKeeper keeper(root, 3, 20);
  for (const std::int64_t step : {10, 20, 30, 40, 50, 60, 70}) save(keeper, step);
  ASSERT_EQ(names(), (std::vector<std::string>{"step_00000020", "step_00000040", "step_00000050",
                                               "step_00000060", "step_00000070"}));
  EXPECT_TRUE(keeper.retire_oldest(false));
  EXPECT_FALSE(keeper.retire_oldest(false)) << "60 is a milestone, 70 good";
  EXPECT_EQ(names(),
            (std::vector<std::string>{"step_00000020", "step_00000040", "step_00000060", "step_00000070"}));
  make(80);  // by another's hand
  EXPECT_FALSE(keeper.retire_oldest(true)) << "a milestone";
  make(90);
  EXPECT_TRUE(keeper.retire_oldest(true));
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000020", "step_00000040", "step_00000060",
                                               "step_00000070", "step_00000080"}));
}

TEST_F(Retention, OneThatCannotBeReadIsNeitherCountedNorTouched) {
  for (const std::int64_t step : {10, 20}) make(step);
  CheckpointKeeper keeper(root, 2);
  CheckpointChoice choice;
  choice.newest = checkpoint_path(root, 10);
  choice.passed_over.push_back({checkpoint_path(root, 20), {false, "reading failed: Input/output error"}});
  keeper.remember(choice);
  for (const std::int64_t step : {12, 14}) save(keeper, step);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000012", "step_00000014", "step_00000020"}));
  save(keeper, 20);  // its own step: what is there makes way, and nothing is lost
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000014", "step_00000020", "step_00000020.aside"}));
}

TEST_F(Retention, NothingGoesWhileAPowerCutMayTakeTheNewOne) {
  for (const std::int64_t step : {10, 20}) make(step);
  CheckpointKeeper keeper(root, 2);
  keeper.remember(choose());
  save(keeper, 30, false);
  EXPECT_EQ(names().size(), 3u);
  save(keeper, 40);
  EXPECT_EQ(names(), (std::vector<std::string>{"step_00000030", "step_00000040"}));
}

TEST_F(Retention, FilesOfOthersSurviveTheirCheckpoint) {
  for (const std::int64_t step : {10, 20}) make(step);
  spill(checkpoint_path(root, 10) / "notes.txt", "thesis");
  CheckpointKeeper keeper(root, 2);
  keeper.remember(choose());
  save(keeper, 30);
  EXPECT_EQ(read_file(root / "step_00000010.old/notes.txt"), "thesis");
  EXPECT_FALSE(fs::exists(root / "step_00000010.old/manifest.json"));
}

TEST_F(Retention, WhatStandsInTheWayIsSetAsideNotDeleted) {
  make(10);
  CheckpointKeeper keeper(root, 2);
  keeper.remember(choose());
  fs::create_directory(checkpoint_path(root, 20));
  spill(checkpoint_path(root, 20) / "notes.txt", "thesis");
  spill(checkpoint_path(root, 30), "a file");
  fs::create_directory(root / "step_00000040.tmp");
  spill(root / "step_00000040.tmp/notes.txt", "more");
  for (const std::int64_t step : {20, 30, 40}) save(keeper, step);
  EXPECT_EQ(read_file(root / "step_00000020.aside/notes.txt"), "thesis");
  EXPECT_EQ(read_file(root / "step_00000030.aside"), "a file");
  EXPECT_EQ(read_file(root / "step_00000040.tmp.aside/notes.txt"), "more");
  EXPECT_NO_THROW(open_and_verify(checkpoint_path(root, 40)));
}

TEST_F(Retention, LeftoversOfKilledSavesGoAndNothingElse) {
  for (const char* name :
       {"step_00000010.tmp", "step_00000020.old", "step_00000030.tmp", "notes.tmp", "step_40.tmp"})
    fs::create_directory(root / name);
  spill(root / "step_00000010.tmp/shard_00000.h5", "");
  spill(root / "step_00000020.old/manifest.json", "");
  for (const char* name : {"step_00000030.tmp", "notes.tmp", "step_40.tmp"})
    spill(root / name / "notes.txt", "thesis");
  spill(root / "step_00000050.tmp", "a file");
  CheckpointKeeper(root, 2).clear_leftovers();
  EXPECT_EQ(names(),
            (std::vector<std::string>{"notes.tmp", "step_00000030.tmp", "step_00000050.tmp", "step_40.tmp"}));
}

TEST_F(Retention, ARunThatLostItsFolderDoesNotWriteIntoAnother) {
  const fs::path dir = root / "run";
  fs::create_directory(dir);
  RunLock first(dir);
  EXPECT_NO_THROW(first.require_held());
  fs::rename(dir, root / "run.old");
  EXPECT_THROW(first.require_held(), Error);  // nobody there
  fs::create_directory(dir);
  EXPECT_THROW(first.require_held(), Error);  // another folder, not yet locked
  const RunLock second(dir);
  EXPECT_THROW(first.require_held(), Error);
}

// A doctor's look at the moment of a start is none of its business.
TEST_F(Retention, AStartWaitsForALookNotForAJob) {
  { const RunLock made(root); }
  const int fd = open((root / "lock").c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_EQ(flock(fd, LOCK_SH | LOCK_NB), 0);
  std::thread look([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    close(fd);
  });
  EXPECT_NO_THROW(RunLock{root});
  look.join();
  EXPECT_NO_THROW(RunLock::require_free(root));
  const RunLock job(root);
  EXPECT_THROW(RunLock::require_free(root), Error);
  EXPECT_NO_THROW(RunLock::require_free(root / "none"));
}

TEST_F(Retention, ALockFileThatWasRemovedIsMadeAgain) {
  RunLock first(root);
  fs::remove(root / "lock");
  EXPECT_NO_THROW(first.require_held());
  EXPECT_THROW(RunLock{root}, Error);
  fs::remove(root / "lock");
  const RunLock second(root);  // quicker than the first one's next look
  EXPECT_THROW(first.require_held(), Error);
}

TEST_F(Retention, TheLockFileHonoursUmask) {
  for (const mode_t mask : {mode_t{0002}, mode_t{0077}}) {
    const fs::path dir = root / std::to_string(mask);
    fs::create_directory(dir);
    const mode_t before = umask(mask);
    { const RunLock lock(dir); }
    umask(before);
    struct stat info {};
    ASSERT_EQ(stat((dir / "lock").c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777u, 0666u & ~mask);
  }
}

// Looked at alone, so that a failure leaves nothing there.
TEST_F(Retention, FoldersOfManyAreNoRunsDirectory) {
  const char* home = std::getenv("HOME");
  const std::string before = home == nullptr ? "" : home;
  for (const char* name : {"everybodys", "home", "home/mine"}) fs::create_directories(root / name);
  fs::permissions(root / "everybodys", fs::perms::all | fs::perms::sticky_bit);
  ASSERT_EQ(setenv("HOME", (root / "home").c_str(), 1), 0);
  for (const fs::path& dir : {fs::path("/etc"), fs::path("/dev/"), fs::path("/usr/../var"),
                              root / "everybodys", root / "home", root / "home/mine/.."}) {
    try {
      require_run_directory(dir);
      ADD_FAILURE() << dir << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << e.what();
      EXPECT_NE(std::string(e.what()).find("name a folder of its own"), std::string::npos) << e.what();
    }
  }
  for (const fs::path& dir : {root / "everybodys/mine", root / "home/mine", root / "home/new"})
    EXPECT_NO_THROW(require_run_directory(dir));
  // A run that began there before that was refused goes on.
  fs::create_directory(root / "home/checkpoints");
  spill(root / "home/metrics.jsonl", "");
  EXPECT_NO_THROW(require_run_directory(root / "home"));
  home == nullptr ? unsetenv("HOME") : setenv("HOME", before.c_str(), 1);
}

TEST_F(Retention, PlacesThatAreNotMeantForRunsAreRefused) {
  spill(root / "file", "");
  fs::create_symlink("loop", root / "loop");
  write_test_store(root / "run/checkpoints/step_00000010", 1);
  fs::create_directories(root / "model");
  spill(root / "model/config.json", "{}");
  const auto code_of = [](const fs::path& dir) {
    try {
      make_run_directory(dir);
      return ExitCode::kDone;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(dir.string()), std::string::npos) << e.what();
      return e.code();
    }
  };
  for (const fs::path& dir :
       {fs::path(""), fs::path("/"), fs::path("/tmp/.."), root / "file", root / "loop", root / "model",
        root / "run/checkpoints", root / "run/checkpoints/step_00000010"})
    EXPECT_EQ(code_of(dir), ExitCode::kUsage) << dir;
  EXPECT_EQ(code_of(root / "file/run"), ExitCode::kBadInput);
  EXPECT_EQ(code_of(root / "run"), ExitCode::kDone);
  EXPECT_EQ(code_of(root / "new/deep"), ExitCode::kDone);
  EXPECT_TRUE(fs::is_directory(root / "new/deep/checkpoints"));
}

TEST_F(Retention, ARankThatHasAFolderForItselfIsFound) {
  for (const char* name : {"shared", "own"}) make_folder(root / name);
  run_in_threads(3, [&](Communicator& world) {
    const bool apart = world.rank() == 1;
    EXPECT_EQ(sees_files_of_rank_0(world, root / (apart ? "own" : "shared")), !apart) << world.rank();
    EXPECT_TRUE(sees_files_of_rank_0(world, root / "nowhere"));  // another fault, for others to tell
    EXPECT_NO_THROW(require_shared(world, root / "shared"));
  });
  for (const char* name : {"shared", "own"}) EXPECT_TRUE(entries_of(root / name).empty()) << name;
  EXPECT_FALSE(path_exists(root / "nowhere"));
}

}  // namespace
}  // namespace upmoe::test

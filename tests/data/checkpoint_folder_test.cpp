// Checkpoint folders: one name for one step, what belongs to this program, why a store cannot be used.

#include "data/checkpoint_folder.h"

#include <nlohmann/json.hpp>

#include "data/crc.h"
#include "data/folder.h"
#include "data/manifest.h"
#include "tests/data/stores.h"

namespace upmoe::test {
namespace {

TEST(StepNames, OneNameForOneStep) {
  for (const std::int64_t step : {std::int64_t{0}, std::int64_t{7}, std::int64_t{12345678},
                                  std::int64_t{123456789}, std::numeric_limits<std::int64_t>::max()})
    EXPECT_EQ(step_of(checkpoint_name(step)), step);
  EXPECT_EQ(checkpoint_name(20), "step_00000020");
  for (const char* name :
       {"step_000000020", "step_00000010.bak", "step_10", "step_", "step_-0000001", "step_+0000001",
        "step_0000001x", "step_00000010 ", "Step_00000010", "step_99999999999999999999"})
    EXPECT_FALSE(step_of(name)) << name;
}

TEST_F(Stores, AnotherNameIsNoCheckpoint) {
  for (const char* name : {"step_000000020", "step_00000010.bak", "step_00000030"}) {
    fs::create_directory(root / name);
    spill(root / name / "manifest.json", "{}");
  }
  EXPECT_EQ(checkpoint_folders(root), std::vector<fs::path>{root / "step_00000030"});
}

TEST_F(Stores, WhatIsInTheWayIsSetAsideUnderANameOfItsOwn) {
  for (int i = 0; i < 3; ++i) {
    spill(root / "step_00000010", std::to_string(i));
    set_aside(root / "step_00000010");
  }
  EXPECT_EQ(read_file(root / "step_00000010.aside"), "0");
  EXPECT_EQ(read_file(root / "step_00000010.aside-2"), "1");
  EXPECT_EQ(read_file(root / "step_00000010.aside-3"), "2");
  spill(root / "notes.aside", "");
  EXPECT_EQ(aside_folders(root).size(), 3u);
}

TEST_F(Stores, RemovingAStoreLeavesWhatIsOfOthers) {
  const fs::path mine = root / "mine", shared = root / "shared";
  write_test_store(mine, 2);
  write_test_store(shared, 2);
  fs::create_directory(shared / "export");
  spill(shared / "export/config.json", "{}");
  spill(shared / "notes.txt", "thesis");
  EXPECT_TRUE(remove_store(mine));
  EXPECT_FALSE(fs::exists(mine));
  EXPECT_FALSE(remove_store(shared));
  EXPECT_EQ(read_file(shared / "notes.txt"), "thesis");
  EXPECT_EQ(read_file(shared / "export/config.json"), "{}");
  EXPECT_FALSE(fs::exists(shared / "manifest.json"));
}

TEST_F(Stores, AFolderWhereAStoreIsPreparedMayBeSomeoneElses) {
  fs::create_directories(root / "s.tmp/mine");
  spill(root / "s.tmp/mine/t", "thesis");
  write_test_store(root / "s", 2);
  EXPECT_EQ(read_file(root / "s.tmp.aside/mine/t"), "thesis");
  fs::remove_all(root / "s");
  fs::remove_all(root / "s.tmp.aside");
  fs::create_directory(root / "s.tmp");
  spill(root / "s.tmp/shard_00007.h5", "of a save that was cut off");
  write_test_store(root / "s", 2);
  EXPECT_NO_THROW(open_and_verify(root / "s"));
  EXPECT_EQ(files_of(root), std::vector<fs::path>{root / "s"});
}

TEST_F(Stores, ARunStandsForItsNewestCheckpoint) {
  write_test_store(root / "run/checkpoints/step_00000001", 1);
  write_test_store(root / "run/checkpoints/step_00000002", 1);
  EXPECT_EQ(newest_if_run(root / "run"), root / "run/checkpoints/step_00000002");
  fs::remove(root / "run/checkpoints/step_00000002/manifest.json");
  EXPECT_EQ(newest_if_run(root / "run"), root / "run/checkpoints/step_00000001");
  EXPECT_EQ(newest_if_run(root / "run/checkpoints/step_00000001"), root / "run/checkpoints/step_00000001");
  EXPECT_EQ(newest_if_run(root / "nowhere"), root / "nowhere");
  fs::remove_all(root / "run/checkpoints/step_00000001");
  EXPECT_THROW(newest_if_run(root / "run"), Error);
  // A checkpoint that a run was told to write beside is still a checkpoint.
  write_test_store(root / "both", 1);
  fs::create_directory(root / "both/checkpoints");
  EXPECT_EQ(newest_if_run(root / "both"), root / "both");
}

TEST_F(Stores, WhatTheSystemRefusesIsNoDamage) {
  const fs::path dir = root / "s";
  write_test_store(dir, 2);
  EXPECT_FALSE(structural_fault(dir));
  const std::string manifest = read_file(dir / "manifest.json");

  fs::remove(dir / "manifest.json");
  EXPECT_TRUE(structural_fault(dir)->damaged);
  fs::create_symlink("manifest.json", dir / "manifest.json");
  EXPECT_FALSE(structural_fault(dir)->damaged);
  EXPECT_NE(structural_fault(dir)->reason.find("symbolic links"), std::string::npos);
  fs::remove(dir / "manifest.json");

  spill(dir / "manifest.json", manifest.substr(0, manifest.size() / 2));
  EXPECT_TRUE(structural_fault(dir)->damaged);
  spill(dir / "manifest.json", manifest);
  fs::resize_file(dir / "shard_00001.h5", 100);
  EXPECT_TRUE(structural_fault(dir)->damaged);

  const auto refuse = [&](int number) {
    return fault_of([&] { throw SystemError(dir, "reading", number); });
  };
  EXPECT_FALSE(refuse(EIO)->damaged);
  EXPECT_FALSE(refuse(EACCES)->damaged);
  EXPECT_NE(refuse(EACCES)->reason.find("Permission denied"), std::string::npos);
  EXPECT_THROW(refuse(EMFILE), SystemError);  // of this process: every checkpoint would look bad
  EXPECT_THROW(refuse(ENOMEM), SystemError);
}

TEST_F(Stores, ANewerFormatIsNoDamage) {
  write_test_store(root / "s", 1);
  nlohmann::json j = nlohmann::json::parse(read_file(root / "s/manifest.json"));
  j["format"] = "upmoe-store-2";
  spill(root / "s/manifest.json", j.dump());
  EXPECT_TRUE(structural_fault(root / "s")->damaged);  // a flipped bit: the checksum is another
  j.erase("checksum");
  const std::string body = j.dump();
  j["checksum"] = crc32c(body.data(), body.size());
  spill(root / "s/manifest.json", j.dump());
  EXPECT_THROW(structural_fault(root / "s"), FormatError);
}

TEST_F(Stores, NothingIsReplacedByARename) {
  fs::create_directory(root / "new");
  fs::create_directory(root / "old");  // an empty one, which rename(2) would replace
  EXPECT_THROW(move_path(root / "new", root / "old"), SystemError);
  EXPECT_NO_THROW(move_path(root / "new", root / "other"));
}

}  // namespace
}  // namespace upmoe::test

// Runs whose checkpoints became unusable: they go on from what is good, save what they reach, and never start
// over by themselves.

#include "data/checkpoint_folder.h"
#include "data/manifest.h"
#include "data/posix_file.h"
#include "data/run_metadata.h"
#include "parallel/thread_comm.h"
#include "tests/trainer/whole_run.h"

namespace upmoe::test {
namespace {

class Recovery : public WholeRun {
 protected:
  using Hurt = std::function<void(const fs::path& checkpoint)>;
  static void flip(const fs::path& checkpoint) {
    const fs::path shard = checkpoint / "shard_00000.h5";
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    const auto at = static_cast<std::streamoff>(fs::file_size(shard) / 2);
    file.seekg(at);
    const char byte = static_cast<char>(file.get());
    file.seekp(at).put(static_cast<char>(byte ^ 0x10));
  }
  std::size_t set_aside(const std::string& name) const {
    return aside_folders(dir_ / name / "checkpoints").size();
  }
};

TEST_F(Recovery, AStepThatIsUnusableIsSavedAgain) {
  const std::vector<std::pair<std::string, Hurt>> kinds{
      {"a bit", flip},
      {"cut", [](const fs::path& c) { fs::resize_file(c / "shard_00000.h5", 100); }},
      {"no manifest", [](const fs::path& c) { fs::remove(c / "manifest.json"); }},
      {"empty",
       [](const fs::path& c) {
         fs::remove_all(c);
         fs::create_directory(c);
       }},
      {"of others",
       [](const fs::path& c) {
         fs::remove_all(c);
         fs::create_directory(c);
         std::ofstream(c / "notes.txt") << "thesis";
       }},
      {"a file",
       [](const fs::path& c) {
         fs::remove_all(c);
         std::ofstream(c) << "thesis";
       }},
      {"links in a circle",
       [](const fs::path& c) {
         fs::remove(c / "manifest.json");
         fs::create_symlink("manifest.json", c / "manifest.json");
       }},
  };
  run(config("whole", 4, 1), 1);
  const auto before = losses("whole");
  for (const auto& [kind, hurt] : kinds) {
    SCOPED_TRACE(kind);
    fs::copy(dir_ / "whole", dir_ / kind, fs::copy_options::recursive);
    hurt(checkpoint(kind, 4));
    run(config(kind, 4, 1), 1);  // from step 2, to the same step
    EXPECT_EQ(losses(kind), before);
    EXPECT_NO_THROW(ShardStore(checkpoint(kind, 4)).verify());
    EXPECT_EQ(set_aside(kind), 1u);
  }
}

TEST_F(Recovery, TheCheckpointJustWrittenStays) {
  RunConfig c = config("run", 8, 2);
  c.checkpoint.keep = 2;
  run(c, 2);
  flip(checkpoint("run", 8));
  c.train.steps = 7;
  c.checkpoint.every = 100;
  run(c, 2);
  EXPECT_NO_THROW(ShardStore(checkpoint("run", 6)).verify());
  EXPECT_NO_THROW(ShardStore(checkpoint("run", 7)).verify());
}

TEST_F(Recovery, ARunNeverStartsOverByItself) {
  run(config("run", 4, 1), 1);
  const auto before = losses("run");
  flip(checkpoint("run", 2));
  fs::remove(checkpoint("run", 4) / "manifest.json");
  for (int again = 0; again < 2; ++again) {
    try {
      run(config("run", 6, 2), 2);
      FAIL() << "started over";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      for (const char* word : {"none can be used", "step_00000002", "step_00000004", "checksum", "run.dir"})
        EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
  EXPECT_EQ(losses("run"), before);
  EXPECT_EQ(set_aside("run"), 0u);  // nothing better is there: left as it is
}

// What counts is the step that a checkpoint holds, not the one in its name.
TEST_F(Recovery, ARenamedCheckpointIsNoSaveOfItsNewName) {
  run(config("run", 4, 1), 1);
  fs::rename(checkpoint("run", 4), checkpoint("run", 6));
  run(config("run", 6, 1), 1);
  EXPECT_EQ(losses("run").size(), 6u);
  EXPECT_EQ(run_metadata_of(ShardStore(checkpoint("run", 6))).step, 6);
}

// Its checksums are right: a program wrote it so, and the run ends with the file and the key.
TEST_F(Recovery, ABrokenRecordIsBadInput) {
  run(config("run", 2, 1), 1);
  const fs::path path = checkpoint("run", 2) / "manifest.json";
  Manifest manifest = parse_manifest(read_text(path, 1 << 20), path.string());
  nlohmann::json record = nlohmann::json::parse(manifest.run);
  record["samples"] = "twelve";
  manifest.run = record.dump();
  write_text_synced(path, manifest_json(manifest));
  run_in_threads(1, [&](Communicator& world) {
    try {
      train(config("run", 4, 1), world, {});
      FAIL() << "went on";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      EXPECT_EQ(std::string(e.what()), path.string() + ": run.samples is of type string, expected a count");
    }
  });
}

TEST_F(Recovery, FreshRefusesUnusableOnesToo) {
  run(config("run", 2, 1), 1);
  flip(checkpoint("run", 2));
  run_in_threads(1, [&](Communicator& world) {
    try {
      train(config("run", 4, 1), world, {{}, true});
      FAIL() << "started over";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << e.what();
    }
  });
}

// One rank finds the damage in its share of the files; all pass over, and say the same.
TEST_F(Recovery, EveryRankReadsAShareAndAllAgree) {
  run(config("run", 4, 3), 3);
  fs::resize_file(checkpoint("run", 4) / "index.h5", 10);
  fs::rename(checkpoint("run", 4), checkpoint("run", 9));
  run(config("run", 5, 2), 2);  // from step 2
  EXPECT_EQ(losses("run").size(), 5u);
  EXPECT_EQ(set_aside("run"), 1u);
}

}  // namespace
}  // namespace upmoe::test

// A run that is stopped and started again is the run that was not: bitwise in the same layout, equal losses
// in another. Whole runs through train(): directory, checkpoints, data order, metrics.

#include "data/checkpoint_folder.h"
#include "parallel/thread_comm.h"
#include "tests/trainer/whole_run.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kSteps = 8;

class Resume : public test::WholeRun {
 protected:
  void expect_bitwise(int ranks, int ep, Precision precision, RouterDType router = RouterDType::kAuto) {
    const auto part = [&](const char* name, std::int64_t steps) {
      RunConfig c = config(name, steps, ep, precision);
      c.router.dtype = router;
      run(c, ranks);
    };
    part("whole", kSteps);
    part("parts", kSteps / 2);
    part("parts", kSteps);
    EXPECT_EQ(losses("whole"), losses("parts"));
    EXPECT_EQ(losses("parts").size(), static_cast<std::size_t>(kSteps));
    EXPECT_EQ(contents(checkpoint("whole", kSteps)), contents(checkpoint("parts", kSteps)));
  }
};

TEST_F(Resume, BitwiseOnOneRank) {
  expect_bitwise(1, 1, Precision::kFp32);
}
TEST_F(Resume, BitwiseOnTwoRanks) {
  expect_bitwise(2, 2, Precision::kFp32);
}
TEST_F(Resume, BitwiseOnThreeRanks) {
  expect_bitwise(3, 3, Precision::kFp32);
}
TEST_F(Resume, BitwiseInBf16) {
  expect_bitwise(2, 1, Precision::kBf16);
}

TEST_F(Resume, BitwiseWithRoutersInFp32) {
  expect_bitwise(2, 2, Precision::kBf16, RouterDType::kFp32);
  const ShardStore store(checkpoint("parts", kSteps));
  for (const auto& [key, tensor] : store.tensors()) {
    const bool router = key.first.ends_with("router_ED");
    if (key.second == "weight") {
      EXPECT_EQ(tensor.dtype, router ? DType::kF32 : DType::kBF16) << key.first;
    }
    EXPECT_FALSE(router && key.second == "master") << key.first;
  }
}

TEST_F(Resume, OtherLayouts) {
  run(config("whole", kSteps, 1), 1);
  run(config("parts", 2, 2), 2);
  run(config("parts", 5, 3), 3);
  run(config("parts", kSteps, 1), 1);
  const auto whole = losses("whole"), parts = losses("parts");
  ASSERT_EQ(whole.size(), parts.size());
  for (const auto& [step, loss] : whole) EXPECT_NEAR(parts.at(step), loss, 1e-6 * loss) << "step " << step;
}

TEST_F(Resume, PassesOverADamagedCheckpoint) {
  run(config("whole", kSteps, 2), 2);
  run(config("parts", 4, 2), 2);
  const fs::path shard = checkpoint("parts", 4) / "shard_00001.h5";
  std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(fs::file_size(shard) / 2));
  const char byte = static_cast<char>(file.peek());
  file.seekp(static_cast<std::streamoff>(fs::file_size(shard) / 2));
  file.put(static_cast<char>(byte ^ 0x10));
  file.close();
  run(config("parts", kSteps, 2), 2);  // from step 2
  EXPECT_EQ(losses("whole"), losses("parts"));
  EXPECT_TRUE(fs::exists(dir_ / "parts/metrics.jsonl.cut"));
}

TEST_F(Resume, EachStartIsRecorded) {
  const auto starts = [&] {
    std::vector<nlohmann::json> found;
    std::ifstream in(dir_ / "run/starts.jsonl");
    for (std::string line; std::getline(in, line);) found.push_back(nlohmann::json::parse(line));
    return found;
  };
  RunConfig c = config("run", 2, 2);
  c.freeze = {"*router*"};
  const RunOrigin origin{{"upmoe", "train", "a b"}, "9.9", "abc-dirty", "a machine", 3};
  run_in_threads(2, [&](Communicator& world) { train(c, world, {Device{}, false, "2 x 1", origin}); });
  c.train.steps = 4;
  c.parallel.ep = 1;
  run(c, 1);
  ASSERT_EQ(starts().size(), 2u);
  const nlohmann::json first = starts()[0], second = starts()[1];
  EXPECT_EQ(first["command"], (std::vector<std::string>{"upmoe", "train", "a b"}));
  EXPECT_EQ(first["program"]["commit"], "abc-dirty");
  EXPECT_EQ(first["program"]["digest"], second["program"]["digest"]);
  EXPECT_EQ(first["machine"], "a machine");
  EXPECT_EQ(first["hosts"], 3);
  EXPECT_EQ(first["cores"], "2 x 1");
  EXPECT_EQ(first["ranks"], 2);
  EXPECT_NE(first["mesh"].get<std::string>().find("ep 2"), std::string::npos) << first["mesh"];
  EXPECT_NE(first["frozen"].get<std::string>().find("router"), std::string::npos) << first["frozen"];
  EXPECT_EQ(first["model"]["experts"], 10);
  EXPECT_EQ(first["model"]["start"], "random weights of seed 1");
  EXPECT_TRUE(first["recipe"].is_null());
  EXPECT_EQ(first["data"]["train"][0]["tokens"], 4000);
  EXPECT_EQ(first["first_step"], 1);
  EXPECT_EQ(second["first_step"], 3);
  EXPECT_TRUE(second["program"]["commit"].is_null());
  EXPECT_EQ(second["ranks"], 1);
  fs::remove_all(dir_ / "run/checkpoints");  // what begins anew is another run
  run(config("run", 2, 1), 1);
  ASSERT_EQ(starts().size(), 1u);
  EXPECT_EQ(starts()[0]["first_step"], 1);
  EXPECT_TRUE(starts()[0]["frozen"].is_null());
}

// What an upcycling wrote beside the model that a run begins from.
TEST_F(Resume, TheRecipeOfItsModelIsRecorded) {
  run(config("source", 2, 1), 1);
  std::ofstream(checkpoint("source", 2) / "upcycle_report.json")
      << R"({"recipe": "seed: 7\n", "source": {"files": []}, "layers": [1, 2]})";
  RunConfig c = config("run", 2, 1);
  c.model = {checkpoint("source", 2).string(), ModelInit::kWeights};
  run(c, 1);
  std::ifstream in(dir_ / "run/starts.jsonl");
  const auto start = nlohmann::json::parse(in);
  EXPECT_EQ(start["recipe"]["recipe"], "seed: 7\n");
  EXPECT_TRUE(start["recipe"].contains("source"));
  EXPECT_FALSE(start["recipe"].contains("layers"));
  EXPECT_EQ(start["model"]["start"], "its weights");
}

TEST_F(Resume, RefusesChangedDataAndModel) {
  run(config("run", 2, 1), 1);
  RunConfig other = config("run", 4, 1);
  other.data.seed = 99;
  EXPECT_THROW(run(other, 1), Error);
  // A batch that ends where a step of the checkpoint ends, and one that does not.
  const std::int64_t before = other.train.global_batch, seen = 2 * before;
  for (const std::int64_t batch : {seen, seen - before / 2, seen + before}) {
    other = config("run", 4, 1);
    other.train.global_batch = batch;
    try {
      run(other, 1);
      ADD_FAILURE() << "went on with steps of " << batch;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << e.what();
      EXPECT_NE(std::string(e.what()).find("train.global_batch"), std::string::npos) << e.what();
    }
  }
}

TEST_F(Resume, FreshRefusesAnExistingRun) {
  run(config("run", 2, 1), 1);
  EXPECT_THROW(run_in_threads(1,
                              [&](Communicator& world) {
                                train(config("run", 4, 1), world, {{}, true});
                              }),
               Error);
}

TEST_F(Resume, KeepsTheNewestCheckpoints) {
  RunConfig c = config("run", kSteps, 1);
  c.checkpoint.keep = 2;
  run(c, 1);
  const auto left = checkpoint_folders(dir_ / "run/checkpoints");
  ASSERT_EQ(left.size(), 2u);
  EXPECT_EQ(left.back(), checkpoint("run", kSteps));
}

TEST_F(Resume, KeepsMilestonesBesideTheNewest) {
  RunConfig c = config("run", kSteps, 1);
  c.checkpoint.every = 1;
  c.checkpoint.keep = 2;
  c.checkpoint.keep_every = 3;
  run(c, 1);
  std::vector<std::int64_t> left, expected{kSteps - 1, kSteps};
  for (const fs::path& folder : checkpoint_folders(dir_ / "run/checkpoints"))
    left.push_back(*step_of(folder.filename().string()));
  for (std::int64_t step = (kSteps - 2) / 3 * 3; step > 0; step -= 3) expected.insert(expected.begin(), step);
  EXPECT_EQ(left, expected);
}

TEST_F(Resume, StopsAfterNonFiniteSteps) {
  RunConfig c = config("run", kSteps, 1);
  c.optimizer.lr = 1e30;  // the second step overflows
  c.optimizer.clip = 0;
  c.checkpoint.every = 1;
  try {
    run(c, 1);
    FAIL() << "trained through infinities";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kNumeric) << e.what();
  }
}

}  // namespace
}  // namespace upmoe

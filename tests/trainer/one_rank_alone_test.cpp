// What one rank alone meets, or sees under a name that all were given: every rank learns of it, and none goes on as the
// others do not.

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "tests/support/own_folder.h"
#include "tests/support/read_file.h"
#include "tests/trainer/whole_run.h"
#include "trainer/run_checkpoints.h"

// A sanitizer has an mmap of its own.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define UPMOE_OWN_MMAP
namespace {
thread_local bool refuses_memory = false;
}  // namespace

// In place of the library's: a rank is a thread, and the limits of a process are those of all its threads.
extern "C" void* mmap(void* address, std::size_t length, int protection, int flags, int file,
                      off_t offset) noexcept {
  if (refuses_memory) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, length, protection, flags, file, offset));
}
#endif

namespace upmoe::test {
namespace {

class OneRankAlone : public WholeRun {
 protected:
  fs::path host(int rank) const { return dir_ / fmt::format("host{}", rank); }

  // A run whose ranks have a working directory each, host(rank), so that a relative path is another file for each; what
  // it was refused with, empty when it was not.
  std::string refused(const RunConfig& c, int ranks) const {
    std::string words;
    try {
      run_in_threads(ranks, [&](Communicator& world) {
        work_in(host(world.rank()));
        EXPECT_EQ(train(c, world, {}), 0);
      });
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << e.what();
      words = e.what();
    }
    return words;
  }
  void write_tokens(const fs::path& path, std::int64_t sequences) const {
    std::vector<std::uint32_t> tokens(static_cast<std::size_t>(sequences * kSeq + 1));
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i * 7 % 61);
    write_token_file(path, tokens, {}, kVocab);
  }
};

#ifdef UPMOE_OWN_MMAP
// As where its address space is limited. Nobody saves, all go on, and the next save is whole.
TEST_F(OneRankAlone, HasNoMemoryForItsCopyOfACheckpoint) {
  const RunConfig c = config("run", 2, 2);
  fs::create_directories(dir_ / "run/checkpoints");
  run_in_threads(2, [&](Communicator& world) {
    Session session(c, read_model_config(c.model.path), world);
    session.params.initialise(session.memory.exec, 1);
    session.optimizer.reset(session.memory.exec);
    RunCheckpoints checkpoints(dir_ / "run", c.checkpoint, world);
    TrainState state;
    state.step = 1;
    refuses_memory = world.rank() == 1;
    checkpoints.begin(session, state, false);
    refuses_memory = false;
    EXPECT_FALSE(checkpoints.busy()) << "rank " << world.rank();
    state.step = 2;
    checkpoints.begin(session, state, false);
    checkpoints.finish();
  });
  EXPECT_FALSE(fs::exists(checkpoint("run", 1)));
  EXPECT_NO_THROW(ShardStore(checkpoint("run", 2)).verify());
}
#endif

TEST_F(OneRankAlone, SeesOtherHeldOutData) {
  if (!may_work_in_own_folder()) GTEST_SKIP() << "threads may not have folders of their own here";
  RunConfig c = config("run", 1, 1);
  c.data.valid = {{"", "valid.h5"}};
  for (const int rank : {0, 1}) {
    fs::create_directories(host(rank));
    write_tokens(host(rank) / "valid.h5", 3 + 2 * rank);
  }
  EXPECT_NE(refused(c, 2).find("different held-out data: rank 0 differs from rank 1 (rank 0 has"),
            std::string::npos);
  write_tokens(host(1) / "valid.h5", 3);
  EXPECT_EQ(refused(c, 2), "");
}

// Of one shape: nothing else would tell.
TEST_F(OneRankAlone, SeesAnotherConfiguration) {
  if (!may_work_in_own_folder()) GTEST_SKIP() << "threads may not have folders of their own here";
  RunConfig c = config("run", 1, 1);
  c.model.path = "model";
  for (const int rank : {0, 1}) {
    fs::create_directories(host(rank));
    fs::copy(dir_ / "model", host(rank) / "model", fs::copy_options::recursive);
  }
  std::string text = read_file(host(1) / "model/config.json");
  text.replace(text.find("1e-6"), 4, "1e-5");
  std::ofstream(host(1) / "model/config.json") << text;
  EXPECT_NE(refused(c, 2).find("different copies of model.path or train.teacher.model: rank 0 differs"),
            std::string::npos);
}

TEST_F(OneRankAlone, SeesOtherWeights) {
  if (!may_work_in_own_folder()) GTEST_SKIP() << "threads may not have folders of their own here";
  RunConfig c = config("run", 1, 1);
  c.model = {"model", ModelInit::kWeights};
  for (const int rank : {0, 1}) {
    RunConfig made = config(fmt::format("made{}", rank), 1, 1);
    made.run.seed = 1 + rank;
    run(made, 1);
    fs::create_directories(host(rank));
    fs::copy(dir_ / fmt::format("made{}", rank), host(rank) / "model", fs::copy_options::recursive);
  }
  EXPECT_NE(refused(c, 2).find("different models in model.path"), std::string::npos);
  fs::remove_all(host(1) / "model");
  fs::copy(host(0) / "model", host(1) / "model", fs::copy_options::recursive);
  EXPECT_EQ(refused(c, 2), "");
}

}  // namespace
}  // namespace upmoe::test

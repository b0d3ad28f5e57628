// A store is complete or invisible whatever happens while it is written: full disks, limits, kills.

#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "data/checkpoint_folder.h"
#include "parallel/thread_comm.h"
#include "tests/data/stores.h"

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_options() {  // NOLINT(bugprone-reserved-identifier): its name
  return "die_after_fork=0";                       // children start threads
}
#endif

namespace upmoe::test {
namespace {

// 4 MiB on each of two ranks, into a folder that holds 2 MiB. `announced` as the caller of StoreWriter estimates it.
int ranks_that_failed_cleanly(const fs::path& dir, std::uint64_t announced) {
  std::atomic<int> failed{0};
  run_in_threads(2, [&](Communicator& world) {
    const std::vector<float> values(std::size_t{1} << 20, 1.5f);
    const auto n = static_cast<std::int64_t>(values.size());
    const StorePiece piece{
        "w", "weight", {2, n}, {Box{{world.rank(), 0}, {1, n}}}, host_view(values.data(), {n})};
    try {
      StoreWriter writer(dir, world, announced);
      writer.write({piece});
      writer.commit(world, "{}");
    } catch (const Error&) {
      ++failed;
    }
  });
  return failed;
}

TEST_F(Stores, FullDisk) {
  const fs::path full = root / "full";
  fs::create_directory(full);
  if (mount("tmpfs", full.c_str(), "tmpfs", 0, "size=2m") == 0) {
    for (const std::uint64_t announced : {std::uint64_t{0}, std::uint64_t{4} << 20}) {
      EXPECT_EQ(ranks_that_failed_cleanly(full / "step_00000001", announced), 2);
      EXPECT_TRUE(fs::is_empty(full)) << announced;
    }
    EXPECT_EQ(umount(full.c_str()), 0);
  }
}

TEST_F(Stores, FileSizeLimit) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{2 << 20, 2 << 20};
    const bool clean = setrlimit(RLIMIT_FSIZE, &limit) == 0 &&
                       ranks_that_failed_cleanly(root / "step_00000001", 0) == 2 && fs::is_empty(root);
    _exit(clean ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(Stores, KilledWhileWriting) {
  int complete = 0, absent = 0;
  for (std::uint64_t k = 0; k < 40; ++k) {
    const fs::path dir = root / fmt::format("step_{:08}", k);
    const pid_t child = fork();
    if (child == 0) {
      write_test_store(dir, 2);
      _exit(0);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(philox(k, 1)[0] % 30'000));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    if (fs::exists(dir)) {
      ++complete;
      EXPECT_NO_THROW(open_and_verify(dir)) << k;
    } else {
      ++absent;
      write_test_store(dir, 2);  // whatever was left over does not disturb the next attempt
      EXPECT_NO_THROW(open_and_verify(dir)) << k;
    }
  }
  EXPECT_GT(absent, 0);
  EXPECT_EQ(checkpoint_folders(root).size(), 40u);
}

}  // namespace
}  // namespace upmoe::test

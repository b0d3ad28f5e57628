#include "kernels/cpu/parallel_for.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace upmoe::cpu {
namespace {

// How often each was run.
std::vector<int> runs_of(std::int64_t n, std::int64_t work) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
  parallel_for(n, work, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  return {runs.begin(), runs.end()};
}

TEST(ParallelFor, RunsEachOnce) {
  for (const std::int64_t n : {0, 1, 2, 3, 7, 64, 100, 1001})
    for (const std::int64_t work : {std::int64_t{0}, std::int64_t{1}, kSerialWork / 100, kSerialWork})
      EXPECT_EQ(runs_of(n, work), std::vector<int>(static_cast<std::size_t>(n), 1)) << n << " of " << work;
}

#ifdef _OPENMP
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

TEST(ParallelFor, RunsEachOnceWithAnyNumberOfThreads) {
  for (const int count : {2, 3, 5, 16}) {
    const Threads threads(count);
    for (const std::int64_t n : {2, 3, 7, 64, 100, 1001})
      EXPECT_EQ(runs_of(n, kSerialWork), std::vector<int>(static_cast<std::size_t>(n), 1))
          << n << " with " << count;
  }
}

// Of the first thread's 32 only the four that it has taken wait for it, not those that it has not come to.
TEST(ParallelFor, WhoIsFreeTakesWhatASlowThreadHasNotBegun) {
  const Threads threads(2);
  std::atomic<int> team = 0, others = 0, waited_for = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  parallel_for(64, kSerialWork, [&](std::int64_t i) {
    team = omp_get_num_threads();
    if (i >= 4) ++others;
    if (i != 0) return;
    while (team == 2 && others < 60 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    waited_for = others.load();
  });
  if (team != 2) GTEST_SKIP() << "a team of " << team;
  EXPECT_EQ(waited_for, 60);
}

// A loop in a loop's body runs where it stands, and does not touch what the outer one has left: all but the first's
// thread, which has twelve more to do, wait until it has been there.
TEST(ParallelFor, MayStandInALoop) {
  const Threads threads(3);
  std::atomic<bool> was_there = false;
  std::vector<std::atomic<int>> runs(std::size_t{40} * 50);
  parallel_for(40, kSerialWork, [&](std::int64_t i) {
    while (i != 0 && !was_there) std::this_thread::yield();
    parallel_for(50, kSerialWork, [&](std::int64_t k) { ++runs[static_cast<std::size_t>(i * 50 + k)]; });
    was_there = true;
  });
  for (const auto& count : runs) ASSERT_EQ(count, 1);
}
#endif

}  // namespace
}  // namespace upmoe::cpu

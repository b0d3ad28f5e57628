// How the cores of a host are shared among its ranks, and what limits them.

#include "parallel/threads.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

#include <fstream>

#include "parallel/host.h"
#include "parallel/thread_comm.h"
#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

class Quota : public testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((dir_.path() / path).parent_path());
    std::ofstream(dir_.path() / path) << text << "\n";
  }
  double quota(const std::string& own) const { return quota_of_container(dir_.path(), own); }

 private:
  test::TemporaryDirectory dir_;
};

TEST_F(Quota, IsTheLeastOfAGroupAndThoseAroundIt) {
  EXPECT_EQ(quota("0::/a/b\n"), 0);
  write("a/b/cpu.max", "max 100000");
  EXPECT_EQ(quota("0::/a/b\n"), 0);
  write("a/cpu.max", "250000 100000");
  EXPECT_EQ(quota("0::/a/b\n"), 2.5);
  write("cpu.max", "100000 100000");
  EXPECT_EQ(quota("0::/a/b\n"), 1);
}

TEST_F(Quota, IsFoundInAContainerThatSeesItsOwnGroupAsTheRoot) {
  write("cpu.max", "50000 100000");
  EXPECT_EQ(quota("0::/\n"), 0.5);
  EXPECT_EQ(quota("0::/kubepods/pod7\n"), 0.5);
}

TEST_F(Quota, OfVersionOne) {
  write("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "300000");
  write("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000");
  write("cpu,cpuacct/cpu.cfs_quota_us", "-1");
  write("cpu,cpuacct/cpu.cfs_period_us", "100000");
  EXPECT_EQ(quota("5:memory:/y\n4:cpu,cpuacct:/docker/x\n"), 3);
}

TEST(HostPlace, TheLowestRankOfAHostSpeaks) {
  const std::vector<std::int64_t> hosts{7, 7, -3, 7, -3};
  for (int rank = 0; rank < 5; ++rank) {
    const HostPlace place = place_among(hosts, rank);
    EXPECT_EQ(place.ranks_here, hosts[static_cast<std::size_t>(rank)] == 7 ? 3 : 2) << rank;
    EXPECT_EQ(place.hosts, 2) << rank;
    EXPECT_EQ(place.speaks, rank == 0 || rank == 2) << rank;
  }
}

class Sharing : public testing::Test {
 protected:
  void SetUp() override {
    if (const char* told = std::getenv("OMP_NUM_THREADS")) told_ = told;
    unsetenv("OMP_NUM_THREADS");
    sched_getaffinity(0, sizeof before_, &before_);
  }
  void TearDown() override {
    sched_setaffinity(0, sizeof before_, &before_);
    if (!told_.empty()) setenv("OMP_NUM_THREADS", told_.c_str(), 1);
  }
  static CoreShare of(int ranks) {
    CoreShare first;
    run_in_threads(ranks, [&](Communicator& world) {
      const CoreShare share = share_cores(world);
      EXPECT_EQ(share.speaks, world.rank() == 0);
      if (world.rank() == 0) first = share;
    });
    return first;
  }
  cpu_set_t before_{};
  std::string told_;
};

TEST_F(Sharing, RanksThatMayRunEverywhereGetAnEvenPart) {
  const int cores = of(1).threads;
  for (const int ranks : {1, 2, 3}) {
    const CoreShare share = of(ranks);
    EXPECT_EQ(share.ranks_here, ranks);
    EXPECT_EQ(share.threads, std::max(1, cores / ranks));
    EXPECT_FALSE(share.is_bound);
    EXPECT_EQ(complaint(share).empty(), ranks <= cores);
  }
}

TEST_F(Sharing, ABindingIsRespected) {
  int cpu = 0;
  while (!CPU_ISSET(cpu, &before_)) ++cpu;
  cpu_set_t one{};
  CPU_SET(cpu, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(of(1).threads, 1);
  EXPECT_EQ(of(1).cores, 1);
  EXPECT_THAT(complaint(of(2)), testing::HasSubstr("2 ranks x 1 thread on 1 core"));
}

TEST_F(Sharing, WhatTheUserSaysStandsAndIsComplainedOfWhenItIsTooMuch) {
  setenv("OMP_NUM_THREADS", "4095", 1);
  const CoreShare share = of(1);
  unsetenv("OMP_NUM_THREADS");
  EXPECT_TRUE(share.was_told);
  EXPECT_EQ(share.threads, 4095);
  EXPECT_THAT(complaint(share),
              testing::AllOf(testing::HasSubstr("4095 threads"), testing::HasSubstr("OMP_NUM_THREADS")));
}

}  // namespace
}  // namespace upmoe

// In which order operations of many groups begin, and who waits for whom, between pretended GPUs.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <thread>

#include "parallel/watchdog.h"
#include "tests/parallel/nccl_ranks.h"

namespace upmoe {

namespace {

// All ranks of a ring send before they receive: the sender must not wait for the receiver's first call.
TEST_F(Nccl, ARingThatSendsFirst) {
  on_gpus(4, [](Communicator& comm) {
    const int next = (comm.rank() + 1) % 4, before = (comm.rank() + 3) % 4;
    comm.connect(ring_routes(4, false, true));
    for (int round = 0; round < 3; ++round) {
      const std::vector<float> mine(50'000, static_cast<float>(comm.rank() + 10 * round));
      std::vector<float> theirs(mine.size());
      Pending sent = comm.send(view(mine), next);
      comm.recv(view(theirs), before);
      sent.wait();
      EXPECT_EQ(theirs, std::vector<float>(mine.size(), static_cast<float>(before + 10 * round)));
    }
  });
}

// Verbs of six groups, none waited for before all are given; their streams come to them in any order.
void verbs_of_many_groups_at_once() {
  fake_cuda::set_nccl_at_once(1);
  fake_cuda::set_delays(3);
  watchdog::start(std::chrono::seconds(5), 0);
  on_gpus(2, [](Communicator& comm) {
    std::vector<std::unique_ptr<Communicator>> groups;
    for (int i = 0; i < 6; ++i) groups.push_back(comm.split(0, comm.rank()));
    for (int round = 0; round < 10; ++round) {
      std::vector<std::vector<float>> in(6, {static_cast<float>(comm.rank() + round)}), out(6, {0, 0});
      std::vector<Pending> pending;
      for (std::size_t i = 0; i < 6; ++i)
        pending.push_back(groups[i]->all_gather(view(out[i]), view(std::as_const(in[i]))));
      for (Pending& p : pending) p.wait();
      for (const auto& o : out)
        EXPECT_EQ(o, (std::vector<float>{static_cast<float>(round), static_cast<float>(round + 1)}));
    }
  });
  watchdog::stop();
}

// Operations that have begun keep their place on the GPU until their peers have come: on two ranks in one order.
TEST_F(Nccl, VerbsOfManyGroupsBeginInOneOrder) {
  verbs_of_many_groups_at_once();
}

TEST_F(NcclDeathTest, VerbsOfManyGroupsWithoutAnOrderWaitForEachOther) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0", 1);
        verbs_of_many_groups_at_once();
      },
      testing::ExitedWithCode(static_cast<int>(ExitCode::kCommunicator)),
      "the collective all_gather .*ranks 0, 1");
}

// Both send to each other before either receives, what two tensors hold: in one operation, or in one for each.
void messages_of_two_tensors(bool together) {
  watchdog::start(std::chrono::seconds(5), 0);
  on_gpus(2, [together](Communicator& comm) {
    const int other = 1 - comm.rank();
    comm.connect(ring_routes(2, false, true));
    const std::vector<float> rows(1000, static_cast<float>(comm.rank())),
        loads(2, 5.0f + static_cast<float>(comm.rank()));
    std::vector<float> their_rows(rows.size()), their_loads(loads.size());
    const std::array<ConstTensorView, 2> mine{view(rows), view(loads)};
    const std::array<TensorView, 2> theirs{view(their_rows), view(their_loads)};
    std::vector<Pending> sent;
    if (together) {
      sent.push_back(comm.send(mine, other));
      comm.recv(theirs, other);
    } else {
      for (const ConstTensorView& t : mine) sent.push_back(comm.send(t, other));
      for (const TensorView& t : theirs) comm.recv(t, other);
    }
    for (Pending& p : sent) p.wait();
    EXPECT_EQ(their_rows, std::vector<float>(1000, static_cast<float>(other)));
    EXPECT_EQ(their_loads, std::vector<float>(2, 5.0f + static_cast<float>(other)));
  });
  watchdog::stop();
}

TEST_F(Nccl, TensorsThatGoTogetherAreOneOperation) {
  messages_of_two_tensors(true);
}

// The second send has not begun before the first is taken, and a receive does not begin before it.
TEST_F(NcclDeathTest, TwoSendsInARowFromBothSidesWaitForEachOther) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(messages_of_two_tensors(false),
              testing::ExitedWithCode(static_cast<int>(ExitCode::kCommunicator)), "ranks 0, 1|ranks 1, 0");
}

}  // namespace

}  // namespace upmoe

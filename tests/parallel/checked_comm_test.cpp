// Ranks that have lost step: the checked communicator names both ranks and what each of them calls.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "parallel/checked_comm.h"
#include "parallel/communicator.h"
#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"

namespace upmoe {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Body = std::function<void(Communicator&)>;

void on_checked_threads(int ranks, const Body& body) {
  run_in_threads(ranks, [&](Communicator& world) {
    const auto comm = make_checked_communicator(world.split(0, world.rank()));
    body(*comm);
  });
}

// What a run ends with, and on how many ranks.
struct Ending {
  std::string message;
  ExitCode code = ExitCode::kDone;
  int raised = 0;
};

Ending ending_of(int ranks, const Body& body) {
  std::vector<std::string> messages(static_cast<std::size_t>(ranks));
  Ending ending;
  try {
    on_checked_threads(ranks, [&](Communicator& comm) {
      try {
        body(comm);
      } catch (const Error& e) {
        messages[static_cast<std::size_t>(comm.rank())] = e.what();
        throw;
      }
    });
  } catch (const Error& e) {
    ending.message = e.what();
    ending.code = e.code();
  }
  for (const std::string& m : messages) ending.raised += m == ending.message && !m.empty() ? 1 : 0;
  return ending;
}

TEST(CheckedCommunicator, AnotherVerbIsNamed) {
  const Ending e = ending_of(3, [](Communicator& comm) {
    float x = 1;
    comm.barrier();
    if (comm.rank() == 2) return comm.barrier();
    comm.all_reduce(host_view(&x, {1}), ReduceOp::kSum);
  });
  EXPECT_EQ(e.code, ExitCode::kCommunicator);
  EXPECT_THAT(e.message, AllOf(HasSubstr("rank 0 calls all_reduce (sum) of fp32 [1] (number 2)"),
                               HasSubstr("rank 2 calls barrier (number 2)")));
}

// All ranks know, so each of them says the same: whichever message is printed is the right one.
TEST(CheckedCommunicator, EveryRankRaisesIt) {
  const Ending e = ending_of(4, [](Communicator& comm) {
    std::vector<float> x(8), y(2);
    if (comm.rank() == 1) comm.all_gather(host_view(x.data(), {8}), host_view(y.data(), {2})).wait();
    comm.reduce_scatter(host_view(y.data(), {2}), host_view(x.data(), {8})).wait();
  });
  EXPECT_EQ(e.raised, 4) << e.message;
  EXPECT_THAT(e.message, AllOf(HasSubstr("rank 0 calls reduce_scatter of fp32 [8]"),
                               HasSubstr("rank 1 calls all_gather of fp32 [2]")));
}

TEST(CheckedCommunicator, ArgumentsAreCompared) {
  struct Case {
    Body body;
    const char *first, *second;
  };
  const std::vector<Case> cases{
      {[](Communicator& comm) {
         std::vector<float> x(4);
         comm.all_reduce(host_view(x.data(), {comm.rank() == 0 ? 3 : 4}), ReduceOp::kSum);
       },
       "rank 0 calls all_reduce (sum) of fp32 [3]", "rank 1 calls all_reduce (sum) of fp32 [4]"},
      {[](Communicator& comm) {
         float x = 0;
         comm.all_reduce(host_view(&x, {1}), comm.rank() == 0 ? ReduceOp::kMin : ReduceOp::kMax);
       },
       "rank 0 calls all_reduce (min)", "rank 1 calls all_reduce (max)"},
      {[](Communicator& comm) {
         std::int64_t x = 0;
         comm.rank() == 0 ? comm.broadcast(host_view(&x, {1}), 0)
                          : comm.broadcast(host_view(reinterpret_cast<double*>(&x), {1}), 0);
       },
       "rank 0 calls broadcast from rank 0 of int64 [1]", "rank 1 calls broadcast from rank 0 of fp64 [1]"},
      {[](Communicator& comm) {
         float x = 0;
         comm.broadcast(host_view(&x, {1}), comm.rank());
       },
       "rank 0 calls broadcast from rank 0", "rank 1 calls broadcast from rank 1"},
      {[](Communicator& comm) { comm.rank() == 0 ? void(comm.split(0, 0)) : comm.barrier(); },
       "rank 0 calls split", "rank 1 calls barrier"},
      {[](Communicator& comm) {
         std::vector<float> in(12), out(12);
         const std::vector<std::int64_t> even(2, comm.rank() == 0 ? 3 : 2);
         const Shape shape = comm.rank() == 0 ? Shape{6, 2} : Shape{4, 3};
         comm.all_to_all_rows(host_view(out.data(), shape), even, host_view(in.data(), shape), even).wait();
       },
       "rank 0 calls all_to_all_rows of rows fp32 [1, 2]",
       "rank 1 calls all_to_all_rows of rows fp32 [1, 3]"},
  };
  for (const Case& c : cases) {
    const Ending e = ending_of(2, c.body);
    EXPECT_EQ(e.code, ExitCode::kCommunicator);
    EXPECT_THAT(e.message, AllOf(HasSubstr(c.first), HasSubstr(c.second)));
  }
}

TEST(CheckedCommunicator, RowCountsAreComparedPairwise) {
  const Ending e = ending_of(3, [](Communicator& comm) {
    std::vector<std::int64_t> send(3), recv(3);
    if (comm.rank() == 2) send[1] = 5;
    if (comm.rank() == 1) recv[2] = 4;
    std::vector<float> in(comm.rank() == 2 ? 5 : 0), out(comm.rank() == 1 ? 4 : 0);
    comm.all_to_all_rows(host_view(out.data(), {static_cast<std::int64_t>(out.size())}), recv,
                         host_view(in.data(), {static_cast<std::int64_t>(in.size())}), send)
        .wait();
  });
  EXPECT_EQ(e.raised, 3);
  EXPECT_THAT(e.message, HasSubstr("rank 2 sends 5 rows to rank 1, which expects 4"));
}

TEST(CheckedCommunicator, TheReceiverKnowsWhatIsSent) {
  const Ending e = ending_of(2, [](Communicator& comm) {
    std::vector<float> x(6);
    if (comm.rank() == 0) comm.send(host_view(x.data(), {2, 3}), 1);
    if (comm.rank() == 1) comm.recv(host_view(x.data(), {3, 2}), 0);
  });
  EXPECT_THAT(e.message, AllOf(HasSubstr("rank 0 calls send of fp32 [2, 3]"),
                               HasSubstr("rank 1 expects a send of fp32 [3, 2]")));
}

TEST(CheckedCommunicator, TheReceiverKnowsHowManyGoTogether) {
  const Ending e = ending_of(2, [](Communicator& comm) {
    std::vector<float> x(6);
    const TensorView t = host_view(x.data(), {2, 3});
    if (comm.rank() == 0) comm.send(std::array<ConstTensorView, 2>{t, t}, 1);
    if (comm.rank() == 1) comm.recv(t, 0);
  });
  EXPECT_THAT(e.message, AllOf(HasSubstr("rank 0 calls send of fp32 [2, 3] (one of 2 together)"),
                               HasSubstr("rank 1 expects a send of fp32 [2, 3]")));
}

TEST(CheckedCommunicator, GroupsOfItAreCheckedToo) {
  for (const bool by_colour : {true, false}) {
    const Ending e = ending_of(4, [&](Communicator& comm) {
      const int first = comm.rank() / 2 * 2;
      const auto pair = by_colour ? comm.split(first, comm.rank()) : comm.subgroup({first, first + 1});
      float x = 0;
      if (comm.rank() == 3) return pair->barrier();
      pair->all_reduce(host_view(&x, {1}), ReduceOp::kSum);
    });
    EXPECT_THAT(e.message, AllOf(HasSubstr("a group of 2"), HasSubstr("rank 1 calls barrier")));
  }
}

// Row counts, contents, colours and keys are each rank's own; results and books are the transport's.
TEST(CheckedCommunicator, RanksInStepDoNotNoticeIt) {
  on_checked_threads(3, [](Communicator& comm) {
    const int me = comm.rank();
    Ledger ledger;
    const On on(nullptr, &ledger);
    std::vector<std::int64_t> send(3), recv(3, me);
    for (std::size_t p = 0; p < 3; ++p) send[p] = static_cast<std::int64_t>(p);  // p rows go to rank p
    std::vector<float> in(3, static_cast<float>(me)), out(3 * static_cast<std::size_t>(me));
    comm.all_to_all_rows(host_view(out.data(), {3 * me}), recv, host_view(in.data(), {3}), send, on).wait();
    for (std::size_t i = 0; i < out.size(); ++i)
      EXPECT_EQ(out[i], static_cast<float>(i / static_cast<std::size_t>(me)));
    float sum = static_cast<float>(me);
    const auto same = comm.split(0, -me);
    same->all_reduce(host_view(&sum, {1}), ReduceOp::kSum, on);
    EXPECT_EQ(sum, 3.0f);
    EXPECT_EQ(same->rank(), 2 - me);
    ASSERT_EQ(ledger.entries().size(), 2u);
    EXPECT_EQ(ledger.entries().at("all_to_all_rows").bytes_sent, 4.0 * (3 - me));
    EXPECT_EQ(ledger.entries().at("all_to_all_rows").calls, 1);
  });
}

TEST(CheckedCommunicator, OnOneRankAndOnARankThatDoesNotExist) {
  float x = 2;
  make_checked_communicator(make_self_communicator())->all_reduce(host_view(&x, {1}), ReduceOp::kSum);
  EXPECT_EQ(x, 2.0f);
  const auto dry = make_checked_communicator(make_dry_communicator(3, 8));
  dry->all_reduce(host_view(&x, {1}), ReduceOp::kSum);
  EXPECT_EQ(dry->subgroup({1, 3})->rank(), 1);
  EXPECT_THROW(make_checked_communicator(nullptr), Error);
}

}  // namespace
}  // namespace upmoe

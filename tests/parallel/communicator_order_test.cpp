// What holds between verbs: order of waits, groups, agreement on errors, mismatches, peers that throw.

#include <algorithm>
#include <array>
#include <atomic>

#include "parallel/dry_comm.h"
#include "parallel/thread_comm.h"
#include "tests/parallel/every_transport.h"

namespace upmoe {

namespace {

// Started in one order, waited for in another one on each rank, with blocking verbs in between.
TEST_P(EveryTransport, ManyPendingsWaitedInAnyOrder) {
  on_all_ranks([](Communicator& comm) {
    constexpr int kEach = 12;
    const auto n = static_cast<std::size_t>(comm.size());
    std::vector<Exchange> exchanges(kEach);
    std::vector<std::vector<float>> gathered(kEach, std::vector<float>(n * 700)), mine(kEach);
    std::vector<std::vector<double>> sums(kEach, std::vector<double>(300)), parts(kEach);
    std::vector<Pending> pending;
    for (int k = 0; k < kEach; ++k) {
      const auto i = static_cast<std::size_t>(k);
      mine[i].assign(700, static_cast<float>(comm.rank() * 100 + k));
      parts[i].assign(n * 300, static_cast<double>(comm.rank() + k));
      pending.push_back(exchanges[i].start(comm, k));
      pending.push_back(comm.all_gather(view(gathered[i]), view(std::as_const(mine[i]))));
      pending.push_back(comm.reduce_scatter(view(sums[i]), view(std::as_const(parts[i]))));
      if (k % 4 == 3) comm.barrier();
    }
    std::vector<std::size_t> order(pending.size());
    std::iota(order.begin(), order.end(), 0);
    const auto key = [&](std::size_t i) { return philox(static_cast<std::uint64_t>(comm.rank()), i)[0]; };
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return key(a) < key(b); });
    for (const std::size_t i : order) pending[i].wait();
    for (int k = 0; k < kEach; ++k) {
      const auto i = static_cast<std::size_t>(k);
      EXPECT_EQ(exchanges[i].out, exchanges[i].expected);
      for (std::size_t at = 0; at < gathered[i].size(); ++at)
        ASSERT_EQ(gathered[i][at], static_cast<float>(static_cast<int>(at / 700) * 100 + k));
      const int size = comm.size();
      for (const double s : sums[i]) ASSERT_EQ(s, size * (size - 1) / 2 + size * k);
    }
  });
}

TEST_P(EveryTransport, DroppedPendingCompletes) {
  on_all_ranks([](Communicator& comm) {
    std::vector<float> whole(static_cast<std::size_t>(comm.size()) * 50'000),
        mine(50'000, static_cast<float>(comm.rank() + 1));
    { const Pending dropped = comm.all_gather(view(whole), view(std::as_const(mine))); }
    EXPECT_EQ(whole.front(), 1.0f);
    EXPECT_EQ(whole.back(), static_cast<float>(comm.size()));
    Pending assigned = comm.all_gather(view(whole), view(std::as_const(mine)));
    assigned = comm.all_gather(view(whole), view(std::as_const(mine)));  // completes the first
    assigned.wait();
    assigned.wait();  // nothing left to do
    Pending nothing;
    nothing.wait();
  });
}

TEST_P(EveryTransport, SplitOrdersByKey) {
  on_all_ranks([](Communicator& comm) {
    const int colour = comm.rank() % 2;
    const auto half = comm.split(colour, -comm.rank());  // descending
    std::vector<int> members;
    for (int r = comm.size() - 1; r >= 0; --r)
      if (r % 2 == colour) members.push_back(r);
    ASSERT_EQ(half->size(), static_cast<int>(members.size()));
    EXPECT_EQ(members[static_cast<std::size_t>(half->rank())], comm.rank());
    std::int32_t sum = comm.rank();
    half->all_reduce(host_view(&sum, {1}), ReduceOp::kSum);
    EXPECT_EQ(sum, std::accumulate(members.begin(), members.end(), 0));
    const auto again = half->split(0, half->rank());  // a group of a group
    std::int32_t first = comm.rank();
    again->broadcast(host_view(&first, {1}), 0);
    EXPECT_EQ(first, members.front());
  });
}

TEST_P(EveryTransport, SubgroupsOfNeighbours) {
  on_all_ranks([](Communicator& comm) {
    std::vector<int> members;
    for (int r = comm.rank() / 2 * 2; r < std::min(comm.rank() / 2 * 2 + 2, comm.size()); ++r)
      members.push_back(r);
    const auto pair = comm.subgroup(members);
    EXPECT_EQ(pair->size(), static_cast<int>(members.size()));
    EXPECT_EQ(members[static_cast<std::size_t>(pair->rank())], comm.rank());
    std::int64_t sum = comm.rank();
    pair->all_reduce(host_view(&sum, {1}), ReduceOp::kSum);
    EXPECT_EQ(sum, std::accumulate(members.begin(), members.end(), std::int64_t{0}));
  });
}

// To the next rank of a ring and from the one before, which is returned. A message that is not eager waits for its
// receiver: every second rank receives first, and the last one in any case.
template <class Send, class Receive>
int round_the_ring(Communicator& comm, const Send& send, const Receive& receive) {
  const bool sends_first = comm.rank() % 2 == 0 && comm.rank() != comm.size() - 1;
  const int next = (comm.rank() + 1) % comm.size(), before = (comm.rank() + comm.size() - 1) % comm.size();
  if (sends_first) send(next);
  receive(before);
  if (!sends_first) send(next);
  return before;
}

TEST_P(EveryTransport, SendAndReceiveRoundTheRing) {
  on_all_ranks([](Communicator& comm) {
    if (comm.size() == 1) {
      float x = 0;
      EXPECT_THROW(comm.send(host_view(&x, {1}), 0), Error);
      EXPECT_THROW(comm.recv(host_view(&x, {1}), 0), Error);
      return;
    }
    comm.connect(ring_routes(comm.size(), false, true));
    for (const std::int64_t n : {0, 1, 3, 100'000}) {  // the last one does not fit an eager message
      const std::vector<float> mine = random_vector<float>(comm.rank(), n);
      std::vector<float> theirs(mine.size());
      const int before = round_the_ring(
          comm, [&](int to) { comm.send(view(mine), to); }, [&](int from) { comm.recv(view(theirs), from); });
      EXPECT_EQ(theirs, random_vector<float>(before, n));
    }
    float x = 0;
    EXPECT_THROW(comm.send(host_view(&x, {1}), comm.size()), Error);
    EXPECT_THROW(comm.recv(host_view(&x, {1}), -1), Error);
    EXPECT_THROW(comm.recv(host_view(&x, {1}), comm.rank()), Error);
  });
}

TEST_P(EveryTransport, TensorsThatAreSentTogether) {
  on_all_ranks([](Communicator& comm) {
    if (comm.size() == 1) return;
    comm.connect(ring_routes(comm.size(), false, true));
    for (const std::int64_t n : {0, 3, 100'000}) {
      const std::vector<float> rows = random_vector<float>(comm.rank(), n);
      const std::vector<double> loads{static_cast<double>(comm.rank()), 0.5};
      std::vector<float> their_rows(rows.size());
      std::vector<double> their_loads(2);
      const std::array<ConstTensorView, 2> mine{view(rows), host_view(loads.data(), {2})};
      const std::array<TensorView, 2> theirs{view(their_rows), host_view(their_loads.data(), {2})};
      Ledger ledger;
      const int before = round_the_ring(
          comm, [&](int to) { comm.send(mine, to, On(nullptr, &ledger)); },
          [&](int from) { comm.recv(theirs, from); });
      EXPECT_EQ(their_rows, random_vector<float>(before, n));
      EXPECT_EQ(their_loads, (std::vector<double>{static_cast<double>(before), 0.5}));
      EXPECT_EQ(ledger.entries().at("send").bytes_sent, static_cast<double>(n * 4 + 16));
    }
    const int other = (comm.rank() + 1) % comm.size();
    EXPECT_THROW(comm.send(std::span<const ConstTensorView>{}, other), Error);
    EXPECT_THROW(comm.recv(std::span<const TensorView>{}, other), Error);
  });
}

TEST_P(EveryTransport, BarrierHoldsEverybodyBack) {
  on_all_ranks([](Communicator& comm) {
    static std::atomic<int> arrived;
    if (mpi_world != nullptr) return comm.barrier();  // counted below in shared memory only
    if (comm.rank() == 0) arrived = 0;
    comm.barrier();
    ++arrived;
    comm.barrier();
    EXPECT_EQ(arrived, comm.size());
    comm.barrier();
  });
}

// One rank fails: it throws its own error, the others throw a silent one with the same code.
TEST_P(EveryTransport, RunAgreed) {
  on_all_ranks([](Communicator& comm) {
    run_agreed(comm, [] {});
    const int bad = comm.size() - 1;
    try {
      run_agreed(comm, [&] {
        if (comm.rank() == bad) fail(ExitCode::kBadInput, "the file is torn");
      });
      ADD_FAILURE() << "rank " << comm.rank() << " went on";
    } catch (const PeerError& e) {
      EXPECT_NE(comm.rank(), bad);
      EXPECT_STREQ(e.what(), "");
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
    } catch (const Error& e) {
      EXPECT_EQ(comm.rank(), bad);
      EXPECT_STREQ(e.what(), "the file is torn");
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
    }
    // An exception that is no Error, without words.
    EXPECT_THROW(run_agreed(comm,
                            [&] {
                              if (comm.rank() == 0) throw std::runtime_error("");
                            }),
                 Error);
    // Everybody fails, each in its own way: the lowest rank speaks for all.
    try {
      agree(comm, comm.rank() == 0 ? ExitCode::kUsage : ExitCode::kNumeric,
            fmt::format("rank {}", comm.rank()));
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), comm.rank() == 0 ? "rank 0" : "");
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      EXPECT_EQ(dynamic_cast<const PeerError*>(&e) != nullptr, comm.rank() != 0);
    }
    agree(comm, ExitCode::kUsage, "");  // still in step
  });
}

// The verbs of one step, for the ledger.
void one_of_each(Communicator& comm, const On& on) {
  const auto n = static_cast<std::size_t>(comm.size());
  std::vector<float> x(300), whole(300 * n), rows(4 * n);
  const std::vector<std::int64_t> two(n, 2);
  comm.all_reduce(view(x), ReduceOp::kSum, on);
  comm.broadcast(view(x), 0, on);
  comm.barrier();
  comm.reduce_scatter(view(x), view(std::as_const(whole)), on).wait();
  comm.all_gather(view(whole), view(std::as_const(x)), on).wait();
  std::vector<float> out(4 * n);
  const auto shape = Shape{static_cast<std::int64_t>(2 * n), 2};
  comm.all_to_all_rows(host_view(out.data(), shape), two,
                       host_view(static_cast<const float*>(rows.data()), shape), two, on)
      .wait();
  std::vector<int> all(n);
  std::iota(all.begin(), all.end(), 0);
  const auto group = comm.subgroup(all);
  group->all_reduce(view(x), ReduceOp::kSum, on);
}

TEST_P(EveryTransport, BooksWhatTheDryOneBooks) {
  on_all_ranks([](Communicator& comm) {
    Ledger real, dry;
    one_of_each(comm, On(nullptr, &real));
    one_of_each(*make_dry_communicator(comm.rank(), comm.size()), On(nullptr, &dry));
    EXPECT_EQ(real.total().bytes_sent, dry.total().bytes_sent);
    ASSERT_EQ(real.entries().size(), dry.entries().size());
    for (const auto& [verb, cost] : dry.entries()) {
      const auto it = real.entries().find(verb);
      ASSERT_NE(it, real.entries().end()) << verb;
      EXPECT_EQ(it->second.calls, cost.calls) << verb;
      EXPECT_EQ(it->second.bytes_sent, cost.bytes_sent) << verb;
    }
  });
}

// Rank 0 sends one row more than rank 1 expects, in each way in which counts can disagree.
TEST_P(EveryTransport, MismatchedRowCountsAreAnError) {
  if (test::on_gpu() && !is_checked())
    GTEST_SKIP() << "NCCL does not know: both sides wait until the deadline";
  for (const auto& [sent, expected] : {std::pair<std::int64_t, std::int64_t>{3, 2}, {2, 3}, {0, 1}, {1, 0}}) {
    const auto body = [sent = sent, expected = expected](Communicator& world) {
      if (world.size() < 2) return;
      std::vector<int> all(static_cast<std::size_t>(world.size()));
      std::iota(all.begin(), all.end(), 0);
      const auto comm = world.subgroup(all);  // its own stream of messages: it is out of step afterwards
      std::vector<std::int64_t> send_rows(all.size()), recv_rows(all.size());
      if (comm->rank() == 0) send_rows[1] = sent;
      if (comm->rank() == 1) recv_rows[0] = expected;
      std::vector<float> in(static_cast<std::size_t>(sent)), out(static_cast<std::size_t>(expected));
      if (comm->rank() != 0) in.clear();
      if (comm->rank() != 1) out.clear();
      const auto exchange = [&] {
        comm->all_to_all_rows(view(out), recv_rows, view(std::as_const(in)), send_rows).wait();
      };
      if (mpi_world == nullptr || is_checked() || comm->rank() == 1) {
        exchange();
        if (comm->rank() == 1) ADD_FAILURE() << sent << " rows sent, " << expected << " expected, no error";
      } else {
        EXPECT_NO_THROW(exchange());
      }
    };
    if (is_checked()) {  // every rank knows
      EXPECT_THROW(on_all_ranks(body), Error);
    } else if (mpi_world != nullptr && mpi_world->rank() == 1) {
      try {
        on_all_ranks(body);
        ADD_FAILURE();
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("rank 0 of the group sent "), std::string::npos) << e.what();
        EXPECT_NE(std::string(e.what()).find("rank 1 expected"), std::string::npos) << e.what();
      }
    } else if (mpi_world != nullptr || GetParam() == "self" || GetParam() == "threads1") {
      on_all_ranks(body);
    } else {
      EXPECT_THROW(on_all_ranks(body), Error);
    }
  }
}

TEST_P(EveryTransport, RanksThatWereGivenDifferentThings) {
  on_all_ranks([](Communicator& comm) {
    require_equal(comm, "configurations", "the same");
    if (comm.size() == 1) return;
    const int last = comm.size() - 1;
    try {
      require_equal(comm, "configurations", fmt::format("a: 1\nb:\n  c: {}\n", comm.rank() == last ? 4 : 3));
      ADD_FAILURE() << "rank " << comm.rank();
    } catch (const PeerError&) {
      EXPECT_NE(comm.rank(), 0);
    } catch (const Error& e) {
      EXPECT_EQ(comm.rank(), 0);
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      const std::string expected = fmt::format(
          "different configurations: rank 0 differs from rank {0} (rank 0 has 'b.c: 3', rank {0} 'b.c: 4');",
          last);
      EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
    }
  });
}

TEST(RingRoutes, AreEachNeighboursInPairsFirst) {
  const auto text = [](int ranks, bool backward, bool closed) {
    std::string all;
    for (const Route& r : ring_routes(ranks, backward, closed)) all += fmt::format(" {}>{}", r.from, r.to);
    return all;
  };
  EXPECT_EQ(text(1, false, true), "");
  EXPECT_EQ(text(2, false, true), " 0>1 1>0");
  EXPECT_EQ(text(5, false, false), " 0>1 2>3 1>2 3>4");
  EXPECT_EQ(text(4, true, true), " 1>0 3>2 2>1 0>3");
}

TEST(Threads, AThrowingRankUnblocksTheOthers) {
  if (mpi_world != nullptr) return;
  const std::vector<Body> stuck_in{
      [](Communicator& comm) { comm.barrier(); },
      [](Communicator& comm) {
        float x = 0;
        comm.recv(host_view(&x, {1}), 2);
      },
      [](Communicator& comm) { comm.split(0, 0); },
      [](Communicator& comm) {
        std::vector<float> x(4), one(1);
        comm.all_gather(view(x), view(std::as_const(one))).wait();
      },
  };
  for (const Body& verb : stuck_in) {
    std::atomic<int> peers{0};
    try {
      run_in_threads(4, [&](Communicator& comm) {
        if (comm.rank() == 2) fail(ExitCode::kNumeric, "loss is NaN");
        try {
          verb(comm);
        } catch (const PeerError&) {
          ++peers;
          throw;
        }
      });
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "loss is NaN");
      EXPECT_EQ(e.code(), ExitCode::kNumeric);
    }
    EXPECT_EQ(peers, 3);
  }
}

TEST(Threads, AnyExceptionIsRethrown) {
  if (mpi_world != nullptr) return;
  EXPECT_THROW(run_in_threads(3,
                              [](Communicator& comm) {
                                if (comm.rank() == 1) throw std::out_of_range("somewhere");
                                comm.barrier();
                              }),
               std::out_of_range);
  EXPECT_THROW(run_in_threads(0, [](Communicator&) {}), Error);
}

TEST(Threads, AbortEndsTheOthers) {
  if (mpi_world != nullptr) return;
  try {
    run_in_threads(3, [](Communicator& comm) { comm.rank() == 1 ? comm.abort(3) : comm.barrier(); });
    ADD_FAILURE();
  } catch (const PeerError& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);  // the 3 of the rank that ended it
  }
}

TEST(Dry, ChecksItsArguments) {
  EXPECT_THROW(make_dry_communicator(4, 4), Error);
  EXPECT_THROW(make_dry_communicator(-1, 4), Error);
  const auto dry = make_dry_communicator(2, 8);
  EXPECT_THROW(dry->split(0, 0), Error);
  EXPECT_THROW(dry->subgroup({0, 1}), Error);
  const auto group = dry->subgroup({0, 2, 4, 6});
  EXPECT_EQ(group->rank(), 1);
  EXPECT_EQ(group->size(), 4);
  std::vector<float> out(7), in(4, 1.0f);
  EXPECT_THROW(dry->reduce_scatter(view(out), view(std::as_const(in))), Error);
  EXPECT_THROW(dry->all_gather(view(out), view(std::as_const(in))), Error);
  out.assign(32, -1.0f);
  dry->all_gather(view(out), view(std::as_const(in))).wait();
  EXPECT_EQ(out, std::vector<float>(32, -1.0f));  // nothing moved
}

}  // namespace

}  // namespace upmoe

// What the verbs refuse: the same on every transport, in the same words, before anything was sent or booked. And what
// they book.

#include <atomic>
#include <chrono>
#include <thread>

#include "parallel/checked_comm.h"
#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/parallel/every_transport.h"

namespace upmoe {

namespace {

struct Wrong {
  const char* message;
  std::function<void(Communicator&, const On&)> verb;
};

std::vector<std::int64_t> counts(const Communicator& comm, std::int64_t each, std::int64_t own) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(comm.size()), each);
  rows[static_cast<std::size_t>(comm.rank())] = own;
  return rows;
}

// all_to_all_rows with these counts of rows of `width` floats, in tensors of these many rows.
void exchange(Communicator& comm, const On& on, std::int64_t out_rows, std::vector<std::int64_t> recv_rows,
              std::int64_t in_rows, std::vector<std::int64_t> send_rows, std::int64_t out_width = 3) {
  std::vector<float> out(static_cast<std::size_t>(out_rows * out_width)),
      in(static_cast<std::size_t>(in_rows * 3));
  comm.all_to_all_rows(host_view(out.data(), {out_rows, out_width}), recv_rows,
                       host_view(std::as_const(in).data(), {in_rows, 3}), send_rows, on)
      .wait();
}

std::vector<Wrong> wrong_verbs() {
  static float one[64];
  static double wide[64];
  const auto floats = [](std::int64_t n) { return host_view(one, {n}); };
  return {
      {"root -1 of", [=](Communicator& c, const On& on) { c.broadcast(floats(1), -1, on); }},
      {"root 5 of", [=](Communicator& c, const On& on) { c.broadcast(floats(1), 5, on); }},
      {"reduce_scatter of fp32 [7] into fp32 [8] on",
       [=](Communicator& c, const On& on) { c.reduce_scatter(floats(8), floats(7), on).wait(); }},
      {"reduce_scatter of fp32 [0] into fp64 [0] on",
       [=](Communicator& c, const On& on) { c.reduce_scatter(host_view(wide, {0}), floats(0), on).wait(); }},
      {"all_gather of fp32 [8] into fp32 [7] on",
       [=](Communicator& c, const On& on) { c.all_gather(floats(7), floats(8), on).wait(); }},
      {"all_gather of fp64 [0] into fp32 [0] on",
       [=](Communicator& c, const On& on) { c.all_gather(floats(0), host_view(wide, {0}), on).wait(); }},
      {"row counts for 0 and",
       [](Communicator& c, const On& on) { exchange(c, on, 0, {}, c.size(), counts(c, 1, 1)); }},
      {"rows of [0, 3] and of [0, 2]",
       [](Communicator& c, const On& on) { exchange(c, on, 0, counts(c, 0, 0), 0, counts(c, 0, 0), 2); }},
      {"negative row count",
       [](Communicator& c, const On& on) { exchange(c, on, 2, counts(c, 0, 2), 2, counts(c, 0, -2)); }},
      {"row counts do not add up to",
       [](Communicator& c, const On& on) { exchange(c, on, 2, counts(c, 0, 2), 2, counts(c, 0, 3)); }},
      {"row counts do not add up to",
       [](Communicator& c, const On& on) { exchange(c, on, 2, counts(c, 0, 3), 2, counts(c, 0, 2)); }},
      {"sends itself 2 rows and expects 3",
       [](Communicator& c, const On& on) { exchange(c, on, 3, counts(c, 0, 3), 2, counts(c, 0, 2)); }},
      {"names rank -1 as its peer", [=](Communicator& c, const On& on) { c.send(floats(1), -1, on).wait(); }},
      {"as its peer", [=](Communicator& c, const On& on) { c.send(floats(1), c.rank(), on).wait(); }},
      {"names rank 5 as its peer", [=](Communicator& c, const On& on) { c.recv(floats(1), 5, on); }},
      {"as its peer", [=](Communicator& c, const On& on) { c.recv(floats(1), c.rank(), on); }},
      {"an empty group", [](Communicator& c, const On&) { c.subgroup({}); }},
      {"is not in its own group", [](Communicator& c, const On&) { c.subgroup({c.size()}); }},
  };
}

void expect_refusals(Communicator& comm) {
  Ledger ledger;
  for (const Wrong& wrong : wrong_verbs()) {
    std::string said = "nothing";
    try {
      wrong.verb(comm, On(nullptr, &ledger));
    } catch (const Error& e) {
      said = e.what();
    }
    EXPECT_NE(said.find(wrong.message), std::string::npos)
        << "expected " << wrong.message << ", found " << said;
  }
  EXPECT_TRUE(ledger.entries().empty());
}

TEST_P(EveryTransport, RefusesWrongArguments) {
  on_all_ranks([](Communicator& comm) {
    expect_refusals(comm);
    std::int32_t sum = 1;  // the group is still in step
    comm.all_reduce(host_view(&sum, {1}), ReduceOp::kSum);
    EXPECT_EQ(sum, comm.size());
    exchange(comm, {}, 2 * comm.size(), counts(comm, 2, 2), 2 * comm.size(), counts(comm, 2, 2));
  });
}

TEST(Dry, RefusesWrongArguments) {
  expect_refusals(*make_dry_communicator(2, 4));
  expect_refusals(*make_checked_communicator(make_dry_communicator(0, 3)));
}

// A transport that checks and books nothing itself. That is what they all are.
class Careless final : public Communicator {
 public:
  Careless(int rank, int size, int& moves) : Communicator(rank, size), moves_(moves) {}
  void abort(int) noexcept override {}

 private:
  Pending move() {
    ++moves_;
    return {};
  }
  std::unique_ptr<Communicator> do_split(int, int) override {
    ++moves_;
    return nullptr;
  }
  void do_all_reduce(TensorView, ReduceOp, Stream*) override { move(); }
  void do_broadcast(TensorView, int, Stream*) override { move(); }
  void do_barrier() override { move(); }
  Pending do_reduce_scatter(TensorView, ConstTensorView, Stream*) override { return move(); }
  Pending do_all_gather(TensorView, ConstTensorView, Stream*) override { return move(); }
  Pending do_all_to_all_rows(TensorView, std::span<const std::int64_t>, ConstTensorView,
                             std::span<const std::int64_t>, Stream*) override {
    return move();
  }
  Pending do_send(std::span<const ConstTensorView>, int, Stream*) override { return move(); }
  void do_recv(std::span<const TensorView>, int, Stream*) override { move(); }
  int& moves_;
};

TEST(Door, ATransportNeedNotCheckNorBook) {
  int moves = 0;
  Careless careless(1, 3, moves);
  expect_refusals(careless);
  EXPECT_EQ(moves, 0);
  std::vector<float> x(6);
  const TensorView on_gpu{
      reinterpret_cast<std::byte*>(x.data()), {6}, DType::kF32, Device{DeviceType::kCuda, 0}};
  EXPECT_THROW(careless.all_reduce(on_gpu, ReduceOp::kSum), Error) << "between GPUs without a stream";
  EXPECT_EQ(moves, 0);
  Ledger ledger;
  const On on(nullptr, &ledger);
  careless.all_reduce(view(x), ReduceOp::kSum, on);
  careless.broadcast(view(x), 0, on);  // from another rank
  careless.broadcast(view(x), 1, on);
  careless.reduce_scatter(host_view(x.data(), {2}), view(x), on);
  careless.all_gather(view(x), host_view(x.data(), {2}), on);
  exchange(careless, on, 7, counts(careless, 2, 3), 5, counts(careless, 1, 3));
  careless.send(view(x), 2, on);
  careless.recv(view(x), 0, on);
  careless.barrier();
  EXPECT_EQ(moves, 9);
  const std::map<std::string, double> sent{{"all_reduce", 2 * 24 * 2 / 3.0}, {"broadcast", 24 * 2},
                                           {"reduce_scatter", 8 * 2},        {"all_gather", 8 * 2},
                                           {"all_to_all_rows", 2 * 12},      {"send", 24}};
  ASSERT_EQ(ledger.entries().size(), sent.size());
  for (const auto& [verb, bytes] : sent) {
    EXPECT_EQ(ledger.entries().at(verb).bytes_sent, bytes) << verb;
    EXPECT_EQ(ledger.entries().at(verb).calls, 1) << verb;
  }
}

// Between decorators one of them books: the outermost, which was given the ledger.
TEST(Door, WhatIsWrappedBooksNothing) {
  run_in_threads(2, [](Communicator& world) {
    const auto twice = make_checked_communicator(make_checked_communicator(world.split(0, world.rank())));
    Ledger ledger;
    float x = 1;
    twice->all_reduce(host_view(&x, {1}), ReduceOp::kSum, On(nullptr, &ledger));
    ASSERT_EQ(ledger.entries().size(), 1u);
    EXPECT_EQ(ledger.total().calls, 1);
    EXPECT_EQ(ledger.total().bytes_sent, 4);
  });
}

// Rank 1 comes to each verb after rank 0 has been in it for a while.
TEST(Door, CountsHowLongARankStandsStill) {
  using namespace std::chrono;
  constexpr milliseconds kLate{200}, kAtLeast{50};  // rank 0 may itself be slow to get in
  using Verb = std::function<void(Communicator&, const On&)>;
  const std::vector<Verb> verbs{
      [](Communicator& c, const On& on) {
        float x = 1;
        c.all_reduce(host_view(&x, {1}), ReduceOp::kSum, on);
      },
      [](Communicator& c, const On& on) {
        float x = 1;
        c.broadcast(host_view(&x, {1}), 1, on);
      },
      [](Communicator& c, const On& on) {
        float x = 1, whole[2] = {};
        c.all_gather(host_view(whole, {2}), host_view(&x, {1}), on).wait();
      },
      [](Communicator& c, const On& on) {
        float x = 1, whole[2] = {};
        c.reduce_scatter(host_view(&x, {1}), host_view(whole, {2}), on).wait();
      },
      [](Communicator& c, const On& on) { exchange(c, on, 2, counts(c, 1, 1), 2, counts(c, 1, 1)); },
      [](Communicator& c, const On& on) {
        float x = 1;
        if (c.rank() == 0) c.recv(host_view(&x, {1}), 1, on);
        if (c.rank() == 1) c.send(host_view(&x, {1}), 0, on).wait();
      },
  };
  std::vector<std::atomic<bool>> entered(verbs.size());
  run_in_threads(2, [&](Communicator& world) {
    for (std::size_t i = 0; i < verbs.size(); ++i) {
      Ledger ledger;
      if (world.rank() == 1) {
        entered[i].wait(false);
        std::this_thread::sleep_for(kLate);
      }
      const auto start = steady_clock::now();
      if (world.rank() == 0) {
        entered[i] = true;
        entered[i].notify_one();
      }
      verbs[i](world, On(nullptr, &ledger));
      const duration<double> inside = steady_clock::now() - start;
      EXPECT_LE(ledger.seconds_waited(), inside.count()) << "verb " << i;
      EXPECT_GE(ledger.seconds_waited(), world.rank() == 0 ? duration<double>(kAtLeast).count() : 0)
          << "verb " << i;
    }
  });
}

TEST(Door, WhatGoesOnBesideComputationIsNoStandstill) {
  using namespace std::chrono;
  run_in_threads(2, [](Communicator& world) {
    Ledger ledger;
    float x = 1, whole[2] = {};
    const auto start = steady_clock::now();
    Pending transfer = world.all_gather(host_view(whole, {2}), host_view(&x, {1}), On(nullptr, &ledger));
    const auto computes = steady_clock::now();
    std::this_thread::sleep_for(milliseconds(100));
    const auto waits = steady_clock::now();
    transfer.wait();
    const duration<double> verb = (computes - start) + (steady_clock::now() - waits);
    EXPECT_GT(ledger.seconds_waited(), 0);
    EXPECT_LE(ledger.seconds_waited(), verb.count());
  });
}

TEST(Door, OneRankWaitsForNobody) {
  const auto alone = make_self_communicator();
  Ledger ledger;
  float x = 1, other = 0;
  alone->all_reduce(host_view(&x, {1}), ReduceOp::kSum, On(nullptr, &ledger));
  alone->all_gather(host_view(&other, {1}), host_view(&x, {1}), On(nullptr, &ledger)).wait();
  EXPECT_EQ(other, 1);
  EXPECT_EQ(ledger.seconds_waited(), 0);
}

}  // namespace

}  // namespace upmoe

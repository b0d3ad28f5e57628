// Every verb on every transport. Sums must equal the rank-ordered sum computed here to the bit,
// whatever carries them.

#include <algorithm>

#include "parallel/checked_comm.h"
#include "parallel/watchdog.h"
#include "tests/parallel/every_transport.h"

namespace upmoe {

namespace {

INSTANTIATE_TEST_SUITE_P(All, EveryTransport, testing::ValuesIn(transports()),
                         [](const auto& transport) { return transport.param; });

// One that is sent in slices: small ones, up to 64 KiB, are sent whole.
template <class T>
constexpr std::int64_t kJustOverSmall = (std::int64_t{64} << 10) / static_cast<std::int64_t>(sizeof(T)) + 37;

template <class T>
void check_all_reduce(Communicator& comm) {
  for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, std::int64_t{1000}, kJustOverSmall<T>})
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      std::vector<T> mine = random_vector<T>(comm.rank(), n), expected;
      for (std::int64_t i = 0; i < n; ++i) expected.push_back(ordered_result<T>(op, comm.size(), i));
      comm.all_reduce(view(mine), op);
      EXPECT_TRUE(bitwise_equal(mine, expected)) << n << " elements of " << name_of(DTypeOf<T>::value);
    }
}

TEST_P(EveryTransport, AllReduceAddsInRankOrder) {
  on_all_ranks([](Communicator& comm) {
    check_all_reduce<float>(comm);
    check_all_reduce<bf16>(comm);
    check_all_reduce<double>(comm);
    check_all_reduce<std::int32_t>(comm);
    check_all_reduce<std::int64_t>(comm);
  });
}

TEST_P(EveryTransport, ExactlySummableInputs) {
  on_all_ranks([](Communicator& comm) {
    const int n = comm.size();
    std::vector<float> x(257);
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(i) * 0.25f + static_cast<float>(comm.rank());
    comm.all_reduce(view(x), ReduceOp::kSum);
    for (std::size_t i = 0; i < x.size(); ++i)
      EXPECT_EQ(x[i],
                static_cast<float>(i) * 0.25f * static_cast<float>(n) + static_cast<float>(n * (n - 1)) / 2);
  });
}

template <class T>
void check_reduce_scatter(Communicator& comm) {
  for (const std::int64_t slice : {0, 1, 5, 2'011}) {
    const std::vector<T> in = random_vector<T>(comm.rank(), slice * comm.size());
    std::vector<T> out(static_cast<std::size_t>(slice)), expected;
    for (std::int64_t i = 0; i < slice; ++i)
      expected.push_back(ordered_result<T>(ReduceOp::kSum, comm.size(), comm.rank() * slice + i));
    comm.reduce_scatter(view(out), view(in)).wait();
    EXPECT_TRUE(bitwise_equal(out, expected)) << slice << " of " << name_of(DTypeOf<T>::value);
  }
}

TEST_P(EveryTransport, ReduceScatterAddsInRankOrder) {
  on_all_ranks([](Communicator& comm) {
    check_reduce_scatter<float>(comm);
    check_reduce_scatter<bf16>(comm);
    check_reduce_scatter<double>(comm);
    check_reduce_scatter<std::int64_t>(comm);
  });
}

TEST_P(EveryTransport, AllGather) {
  on_all_ranks([](Communicator& comm) {
    for (const std::int64_t slice : {0, 1, 5, 2'011}) {
      std::vector<float> expected, whole(static_cast<std::size_t>(slice * comm.size()), -1.0f);
      for (int r = 0; r < comm.size(); ++r)
        for (const float v : random_vector<float>(r, slice)) expected.push_back(v);
      const std::vector<float> mine = random_vector<float>(comm.rank(), slice);
      comm.all_gather(view(whole), view(mine)).wait();
      EXPECT_EQ(whole, expected);
      // In place: the rank's own slice is the input.
      std::vector<float> in_place(whole.size(), -1.0f);
      float* own = in_place.data() + comm.rank() * slice;
      std::copy(mine.begin(), mine.end(), own);
      comm.all_gather(view(in_place), host_view(static_cast<const float*>(own), {slice})).wait();
      EXPECT_EQ(in_place, expected);
    }
  });
}

TEST_P(EveryTransport, BroadcastFromEveryRoot) {
  on_all_ranks([](Communicator& comm) {
    for (int root = 0; root < comm.size(); ++root)
      for (const std::int64_t n : {0, 1, 3333}) {
        std::vector<double> x = random_vector<double>(comm.rank(), n);
        comm.broadcast(view(x), root);
        EXPECT_EQ(x, random_vector<double>(root, n));
      }
  });
}

TEST_P(EveryTransport, AllToAllRowsUnevenAndZero) {
  on_all_ranks([](Communicator& comm) {
    for (int round = 0; round < 100; ++round) {
      Exchange e;
      e.start(comm, round).wait();
      EXPECT_EQ(e.out, e.expected) << "round " << round;
    }
  });
}

}  // namespace

}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  upmoe::watchdog::start(std::chrono::seconds(60), runtime.world().rank());
  std::unique_ptr<upmoe::Communicator> chopped, checked;
  if (runtime.world().size() > 1) {
    chopped = upmoe::make_mpi_communicator(1000);
    checked = upmoe::make_checked_communicator(upmoe::make_mpi_communicator());
    upmoe::mpi_world = &runtime.world();
    upmoe::mpi_chopped = chopped.get();
    upmoe::mpi_checked = checked.get();
  }
  testing::InitGoogleTest(&argc, argv);
  const int failed = RUN_ALL_TESTS();
  upmoe::watchdog::stop();
  return failed;
}

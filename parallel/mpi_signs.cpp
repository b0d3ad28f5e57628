#include "parallel/mpi_signs.h"

#include <mpi.h>

#include <algorithm>
#include <array>

#include "parallel/mpi_messages.h"

namespace upmoe {

namespace {

using Sign = std::array<std::int64_t, 2>;  // origin, count

}  // namespace

struct SignsOfLife::Impl {
  struct Letter {
    Sign sign;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  struct Heard {
    Clock::time_point when;
    Sign sign{};
  };

  void send_to_all(const Sign& sign);
  void forget_sent();

  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0, size = 1;
  std::int64_t count = 0;
  std::vector<std::unique_ptr<Letter>> under_way;
  std::vector<Heard> heard;                            // the newest of each rank
  std::map<std::pair<int, int>, std::int64_t> newest;  // count, by (sender, origin)
  std::map<int, std::int64_t> passed_on;               // count, by origin
};

SignsOfLife::SignsOfLife() : impl_(new Impl) {
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &impl_->comm), "MPI_Comm_dup");
  check_mpi(MPI_Comm_set_errhandler(impl_->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  MPI_Comm_rank(impl_->comm, &impl_->rank);
  MPI_Comm_size(impl_->comm, &impl_->size);
  impl_->heard.resize(static_cast<std::size_t>(impl_->size));
}

SignsOfLife::~SignsOfLife() {
  impl_->forget_sent();
  for (auto& letter : impl_->under_way) {  // nobody takes them in any more
    MPI_Request_free(&letter->request);
    (void)letter.release();  // MPI may read it until the end
  }
}

void SignsOfLife::Impl::forget_sent() {
  std::erase_if(under_way, [](const std::unique_ptr<Letter>& letter) {
    int done = 0;
    return MPI_Test(&letter->request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
  });
}

// A rank that takes none in (stopped, or far away) must not make letters pile up here.
void SignsOfLife::Impl::send_to_all(const Sign& sign) {
  forget_sent();
  if (under_way.size() > static_cast<std::size_t>(4 * size)) return;
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    auto letter = std::make_unique<Letter>();
    letter->sign = sign;
    check_mpi(MPI_Isend(letter->sign.data(), 2, MPI_INT64_T, peer, 0, comm, &letter->request), "MPI_Isend");
    under_way.push_back(std::move(letter));
  }
}

void SignsOfLife::tell() {
  take_in();
  impl_->send_to_all({impl_->rank, ++impl_->count});
}

// Rank 2 computes for long, rank 1 waits for it, rank 0 waits for rank 1:
//
//   2 --(2, n)--> 1        rank 1 hears it from 2, for which it waits,
//   1 --(2, n)--> 0        and passes it on: waiting for 1 is not in vain either
//
// Each (origin, count) is believed once from each sender. So when ranks wait for each other in a ring, and nobody
// computes, no new sign is made, the old ones die out, and the deadline comes.
void SignsOfLife::take_in() {
  for (;;) {
    int found = 0;
    MPI_Status status;
    check_mpi(MPI_Iprobe(MPI_ANY_SOURCE, 0, impl_->comm, &found, &status), "MPI_Iprobe");
    if (found == 0) return;
    Sign sign{};
    check_mpi(MPI_Recv(sign.data(), 2, MPI_INT64_T, status.MPI_SOURCE, 0, impl_->comm, MPI_STATUS_IGNORE),
              "MPI_Recv");
    const auto origin = static_cast<int>(sign[0]);
    std::int64_t& newest = impl_->newest[{status.MPI_SOURCE, origin}];
    if (origin == impl_->rank || sign[1] <= newest) continue;
    newest = sign[1];
    impl_->heard[static_cast<std::size_t>(status.MPI_SOURCE)] = {Clock::now(), sign};
  }
}

SignsOfLife::Clock::time_point SignsOfLife::oldest_sign(const std::set<int>& ranks, Clock::time_point since) {
  Clock::time_point oldest = Clock::time_point::max();
  Sign sign{};
  for (const int r : ranks) {
    const Impl::Heard& heard = impl_->heard[static_cast<std::size_t>(r)];
    const auto when = std::max(heard.when, since);
    // The slowest of those that are waited for decides: all of them have to come for the verb to end.
    if (when < oldest) {
      oldest = when;
      sign = heard.sign;
    }
  }
  if (ranks.empty() || oldest == since) return since;
  std::int64_t& passed_on = impl_->passed_on[static_cast<int>(sign[0])];
  if (sign[1] > passed_on) {
    passed_on = sign[1];
    impl_->send_to_all(sign);
  }
  return oldest;
}

}  // namespace upmoe

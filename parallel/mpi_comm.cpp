#include "parallel/mpi_comm.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel/mpi_messages.h"
#include "parallel/mpi_signs.h"
#include "parallel/reduce.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

constexpr int kCollectiveTag = 1, kPairTag = 2;
// In bytes; below, everybody sends everything at once.
constexpr std::size_t kSmallReduce = std::size_t{64} << 10;

// Staging memory that is kept between calls: fresh pages would cost more than the transfer.
class Pool {
 public:
  using Block = std::vector<std::byte>;
  std::unique_ptr<Block> take(std::size_t bytes) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if ((*it)->size() >= bytes && (best == free_.end() || (*it)->size() < (*best)->size())) best = it;
    if (best == free_.end()) return std::make_unique<Block>(bytes);
    std::unique_ptr<Block> block = std::move(*best);
    free_.erase(best);
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    free_.push_back(std::move(block));
    if (free_.size() > 16) free_.erase(free_.begin());
  }

 private:
  std::vector<std::unique_ptr<Block>> free_;
};

// MPI moves messages while one of its calls runs; a message that is sent in pieces waits for the next call on
// both sides. So between ops there is one that does nothing else. An op is progress as well.
class MpiStream final : public Stream {
 public:
  explicit MpiStream(MPI_Comm comm) : comm_(comm) {}
  void poll() override {
    watchdog::heartbeat();
    int found = 0;
    check_mpi(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &found, MPI_STATUS_IGNORE), "MPI_Iprobe");
  }

 private:
  MPI_Comm comm_;
};

int rank_in(MPI_Comm comm) {
  int rank = 0;
  check_mpi(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
  return rank;
}

int ranks_of(MPI_Comm comm) {
  int size = 1;
  check_mpi(MPI_Comm_size(comm, &size), "MPI_Comm_size");
  return size;
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MPI_Comm comm, std::size_t chunk)
      : Communicator(rank_in(comm), ranks_of(comm)), comm_(comm), chunk_(chunk) {
    check_mpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  ~MpiCommunicator() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // Freeing is collective: behind an error the peers may not come to it any more.
    if (finalized == 0 && std::uncaught_exceptions() == 0) MPI_Comm_free(&comm_);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<MpiStream>(comm_); }
  void abort(int code) noexcept override { MPI_Abort(MPI_COMM_WORLD, code); }

 private:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    const watchdog::Phase phase("making of a group");
    MPI_Comm child = MPI_COMM_NULL;
    check_mpi(MPI_Comm_split(comm_, color, key, &child), "MPI_Comm_split");
    return std::make_unique<MpiCommunicator>(child, chunk_);
  }

  // Small: everybody sends all of it to everybody, one message each, and sums for itself. Large: in slices,
  //
  //             slice 0   slice 1   slice 2
  //   rank 0    a0        b0        c0           1. slice r goes to rank r, which sums it in rank order
  //   rank 1    a1        b1        c1           2. rank r sends its sum to all others
  //   rank 2    a2        b2        c2
  //
  // which sends 2 (n - 1) / n of the tensor per rank instead of n - 1 times it, in two turns instead of one. Either way
  // every element is summed once in rank order, by one rank or by all alike: the same bits everywhere.
  void do_all_reduce(TensorView inout, ReduceOp op, Stream*) override {
    if (inout.bytes() <= kSmallReduce) {
      auto work = start_slices(inout.bytes(), [&](int) { return inout.data; });
      finish_slices(*work, inout.bytes(), inout.data, inout.data, inout.elements(), inout.dtype, op,
                    "all_reduce");
      return;
    }
    const auto begin = [&](int r) { return inout.elements() * r / size(); };
    const std::int64_t mine = begin(rank()), n = begin(rank() + 1) - mine;
    const std::size_t element = size_of(inout.dtype);
    std::byte* own = inout.data + static_cast<std::size_t>(mine) * element;
    // In place: this waits until the other slices were sent, so the sums of the others may now come to lie there.
    reduce_slices(inout, begin, own, n, op);
    MpiMessages messages(&comm_, chunk_);
    for_peers([&](int p) {
      const auto bytes = [&](int r) { return static_cast<std::size_t>(begin(r + 1) - begin(r)) * element; };
      messages.receive(inout.data + static_cast<std::size_t>(begin(p)) * element, bytes(p), p,
                       kCollectiveTag);
      messages.send(own, bytes(rank()), p, kCollectiveTag);
    });
    messages.wait("all_reduce");
  }

  void do_broadcast(TensorView inout, int root, Stream*) override {
    MpiMessages messages(&comm_, chunk_);
    if (root == rank()) {
      for_peers([&](int p) { messages.send(inout.data, inout.bytes(), p, kCollectiveTag); });
    } else {
      messages.receive(inout.data, inout.bytes(), root, kCollectiveTag);
    }
    messages.wait("broadcast");
  }

  void do_barrier() override {
    MpiMessages messages(&comm_, chunk_);
    for_peers([&](int p) {
      messages.receive(nullptr, 0, p, kCollectiveTag);
      messages.send(nullptr, 0, p, kCollectiveTag);
    });
    messages.wait("barrier");
  }

  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream*) override {
    const std::size_t slice = out.bytes();
    auto work = start_slices(slice, [&](int p) { return in.data + static_cast<std::size_t>(p) * slice; });
    return Pending([this, work, out, own = in.data + static_cast<std::size_t>(rank()) * slice] {
      finish_slices(*work, out.bytes(), own, out.data, out.elements(), out.dtype, ReduceOp::kSum,
                    "reduce_scatter");
    });
  }

  Pending do_all_gather(TensorView out, ConstTensorView in, Stream*) override {
    auto messages = std::make_shared<MpiMessages>(&comm_, chunk_);
    std::byte* own = out.data + static_cast<std::size_t>(rank()) * in.bytes();
    // The own part may stand in `out` already.
    if (own != in.data && in.bytes() > 0) std::memmove(own, in.data, in.bytes());
    for_peers([&](int p) {
      messages->receive(out.data + static_cast<std::size_t>(p) * in.bytes(), in.bytes(), p, kCollectiveTag);
      messages->send(own, in.bytes(), p, kCollectiveTag);
    });
    return waiting(messages, "all_gather");
  }

  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream*) override {
    const auto me = static_cast<std::size_t>(rank());
    const std::size_t row = row_bytes(in);
    std::vector<std::size_t> from{0}, to{0};
    for (std::size_t p = 0; p < static_cast<std::size_t>(size()); ++p) {
      from.push_back(from.back() + static_cast<std::size_t>(send_rows[p]) * row);
      to.push_back(to.back() + static_cast<std::size_t>(recv_rows[p]) * row);
    }
    auto messages = std::make_shared<MpiMessages>(&comm_, chunk_);
    for_peers([&](int peer) {
      const auto p = static_cast<std::size_t>(peer);
      messages->receive(out.data + to[p], to[p + 1] - to[p], peer, kCollectiveTag);
      messages->send(in.data + from[p], from[p + 1] - from[p], peer, kCollectiveTag);
    });
    if (to[me + 1] > to[me]) std::memcpy(out.data + to[me], in.data + from[me], to[me + 1] - to[me]);
    return waiting(messages, "all_to_all_rows");
  }

  Pending do_send(std::span<const ConstTensorView> in, int to, Stream*) override {
    auto messages = std::make_shared<MpiMessages>(&comm_, chunk_);
    for (const ConstTensorView& t : in) messages->send(t.data, t.bytes(), to, kPairTag);
    return waiting(messages, "send");
  }
  void do_recv(std::span<const TensorView> out, int from, Stream*) override {
    MpiMessages messages(&comm_, chunk_);
    for (const TensorView& t : out) messages.receive(t.data, t.bytes(), from, kPairTag);
    messages.wait("recv");
  }

  struct Slices {
    MpiMessages messages;
    std::unique_ptr<Pool::Block> staged;  // one slot per rank
  };

  // Each rank begins with its neighbour, so nobody is everybody's first.
  template <class F>
  void for_peers(const F& f) const {
    for (int i = 1; i < size(); ++i) f((rank() + i) % size());
  }
  static Pending waiting(std::shared_ptr<MpiMessages> messages, const char* verb) {
    return Pending([messages = std::move(messages), verb] { messages->wait(verb); });
  }

  // Everybody sends slice p (of `slice` bytes here, at data_for(p)) to p and stages what arrives for itself.
  template <class DataFor>
  std::shared_ptr<Slices> start_slices(std::size_t slice, const DataFor& data_for) {
    return start_slices(slice, data_for, [slice](int) { return slice; });
  }
  template <class DataFor, class BytesFor>
  std::shared_ptr<Slices> start_slices(std::size_t mine, const DataFor& data_for, const BytesFor& bytes_for) {
    auto work = std::make_shared<Slices>(
        Slices{MpiMessages(&comm_, chunk_), pool_.take(mine * static_cast<std::size_t>(size()))});
    for_peers([&](int p) {
      work->messages.receive(work->staged->data() + static_cast<std::size_t>(p) * mine, mine, p,
                             kCollectiveTag);
      work->messages.send(data_for(p), bytes_for(p), p, kCollectiveTag);
    });
    return work;
  }
  void finish_slices(Slices& work, std::size_t slice, const std::byte* own, std::byte* out,
                     std::int64_t elements, DType dtype, ReduceOp op, const char* verb) {
    work.messages.wait(verb);
    std::vector<const std::byte*> parts;
    for (int p = 0; p < size(); ++p)
      parts.push_back(p == rank() ? own : work.staged->data() + static_cast<std::size_t>(p) * slice);
    reduce_in_order(dtype, op, out, parts, elements);
    pool_.give_back(std::move(work.staged));
  }

  // Slice r of `whole` is [begin(r), begin(r+1)); the sum of slice rank() lands in `own`.
  template <class Begin>
  void reduce_slices(const TensorView& whole_tensor, const Begin& begin, std::byte* own,
                     std::int64_t elements, ReduceOp op) {
    const std::size_t element = size_of(whole_tensor.dtype),
                      mine = static_cast<std::size_t>(elements) * element;
    auto work = start_slices(
        mine, [&](int p) { return whole_tensor.data + static_cast<std::size_t>(begin(p)) * element; },
        [&](int p) { return static_cast<std::size_t>(begin(p + 1) - begin(p)) * element; });
    finish_slices(*work, mine, own, own, elements, whole_tensor.dtype, op, "all_reduce");
  }

  MPI_Comm comm_;
  std::size_t chunk_;
  Pool pool_;
};

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::size_t chunk_bytes) {
  UPMOE_CHECK(0 < chunk_bytes && chunk_bytes <= static_cast<std::size_t>(std::numeric_limits<int>::max()),
              "chunks of {} bytes", chunk_bytes);
  // A duplicate: nobody else's message can have this communicator's tags.
  MPI_Comm own = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &own), "MPI_Comm_dup");
  return std::make_unique<MpiCommunicator>(own, chunk_bytes);
}

namespace {
std::unique_ptr<SignsOfLife> signs;
}

SignsOfLife* signs_of_life() {
  return signs.get();
}

MpiWorld start_mpi(int* argc, char*** argv) {
  const watchdog::Phase phase("start of MPI");
  // Its own waits give the processor away too: peers may need it. What the environment says comes first.
  setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
  int provided = 0;
  check_mpi(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  // Other threads (data, checkpoint, watchdog) run beside the one that speaks MPI.
  if (provided < MPI_THREAD_FUNNELED)
    fail(ExitCode::kUsage, "this MPI library allows one thread only (level {}, MPI_THREAD_FUNNELED needed)",
         provided);
  MpiWorld world;
  MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world.size);
  learn_hosts();
  signs = std::make_unique<SignsOfLife>();
  watchdog::tell_peers_by([] { signs->tell(); });
  return world;
}

std::string mpi_library() {
  char words[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  check_mpi(MPI_Get_library_version(words, &length), "MPI_Get_library_version");
  const std::string all(words, static_cast<std::size_t>(length));
  return all.substr(0, all.find_first_of(",\n"));  // "Open MPI v4.1.4", without who built it where
}

void stop_mpi() {
  const watchdog::Phase phase("end of MPI");
  watchdog::tell_peers_by({});
  signs.reset();
  MPI_Finalize();
}

void abort_mpi(int code) {
  MPI_Abort(MPI_COMM_WORLD, code);
  _exit(code);
}

}  // namespace upmoe

#pragma once
// How bytes move between ranks.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/exec.h"
#include "kernels/core/reduce_op.h"

namespace upmoe {

// A transfer under way. Buffers handed to the verb stay untouched until wait() returned; wait() once, on the
// rank's own thread; a Pending that is dropped without wait() waits in its destructor.
class Pending {
 public:
  Pending() = default;  // nothing under way
  explicit Pending(std::function<void()> wait) : wait_(std::move(wait)) {}
  Pending(Pending&& o) noexcept : wait_(std::move(o.wait_)) { o.wait_ = nullptr; }
  Pending& operator=(Pending&& o) noexcept;
  ~Pending();
  void wait();

 private:
  std::function<void()> wait_;
};

// The stream that the tensors of a verb are computed on, and who is told of it. An Exec says all three; a verb that
// is given no ledger (agreements outside of steps) is not booked.
struct On {
  On() = default;
  On(Stream* of_tensors, Ledger* books = nullptr) : stream(of_tensors), ledger(books) {}
  On(const Exec& ex) : stream(ex.stream), ledger(ex.ledger), watcher(ex.watcher) {}
  Stream* stream = nullptr;      // never null for tensors on a GPU
  Ledger* ledger = nullptr;      // null: what is sent is not booked
  OpWatcher* watcher = nullptr;  // null outside tests
};

// Messages of one rank of a group to another one.
struct Route {
  int from, to;
};
// From each rank to the next one, or `backward` to the one before; `closed`: between the last and the first too.
// First all (0, 1), (2, 3) ..., then (1, 2), (3, 4) ..., then the closing one, so that few wait for others.
std::vector<Route> ring_routes(int ranks, bool backward, bool closed);

// One ordered group of ranks. Every verb is collective over the group: same order, same arguments (row counts
// and tensor contents aside) on each member. Tensors are contiguous and live on the communicator's device;
// dtypes fp32, bf16, fp64, int32, int64. bf16 sums are taken in fp32, fp32 sums in fp64, and rounded once: a
// layout that cuts a sum into more parts is no less exact. Every sum adds the ranks' values in rank order, so a
// result does not depend on the transport. Errors: a dead or throwing peer, or a verb past its deadline, raises
// Error(kCommunicator) or ends the process with its exit status; nothing hangs.
//
// Who checks what. The public verbs (communicator.cpp), once and in the same words for every transport: what a
// rank can know of its own arguments (shapes, dtypes, row counts, roots, peers, a stream for tensors on a GPU).
// What they refuse was neither sent nor booked. They book the bytes that leave this rank and show the tensors to
// the watcher. Transports, behind them: what takes two ranks to know (a message of another length, row counts
// that do not match), as far as they see both sides: threads and MPI do, NCCL waits until the deadline. A checked
// communicator finds it beforehand on all of them. Transports tell the watchdog of their waits: they alone know
// when and for whom they wait.
class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  int rank() const { return rank_; }
  int size() const { return size_; }
  // Members with equal colour form a new group, ordered by (key, rank). Collective.
  std::unique_ptr<Communicator> split(int color, int key) { return do_split(color, key); }
  // The same for a group that every member can compute: `members` are ranks of this group in rising order and
  // hold the caller. Collective like split; a dry communicator can do this one.
  std::unique_ptr<Communicator> subgroup(const std::vector<int>& members);

  void all_reduce(TensorView inout, ReduceOp op, const On& on = {});
  void broadcast(TensorView inout, int root, const On& on = {});
  void barrier() { do_barrier(); }  // host
  // Verbs that overlap with computation: they return at once, Pending::wait completes them.
  // in holds size() equal slices; out is the sum of everybody's slice rank().
  Pending reduce_scatter(TensorView out, ConstTensorView in, const On& on = {});
  // out holds size() equal slices; slice r is rank r's in. in may be a piece of out (its own slice).
  Pending all_gather(TensorView out, ConstTensorView in, const On& on = {});
  // Rows of the first dim: send_rows[p] consecutive rows of `in` go to rank p; `out` receives recv_rows[p] rows
  // from rank p, in rank order. Counts are on the host and may be 0; send and receive counts must match pairwise.
  Pending all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                          std::span<const std::int64_t> send_rows, const On& on = {});
  // Prepares sends and receives along these routes: collective over the group, with the same routes in the same order
  // on each member. Between GPUs nothing else can be sent.
  void connect(const std::vector<Route>& routes);
  // Between two ranks, in order: the n-th receive from a rank takes its n-th send. For the pipeline. Several tensors
  // that go together are one operation on both sides: between GPUs operations take turns, and two in a row from here
  // can wait for two in a row from there (parallel/nccl_channel.h). Tensors of one send are of one device.
  Pending send(std::span<const ConstTensorView> in, int to, const On& on = {});
  void recv(std::span<const TensorView> out, int from, const On& on = {});
  Pending send(ConstTensorView in, int to, const On& on = {}) { return send(std::span(&in, 1), to, on); }
  void recv(TensorView out, int from, const On& on = {}) { recv(std::span(&out, 1), from, on); }
  // A stream to compute on, for Exec::stream: its poll() moves on transfers that need the host's help
  // (MPI's progress happens inside its calls alone). Null where none do. Outlived by the communicator.
  virtual std::unique_ptr<Stream> make_stream() { return nullptr; }
  // Ends the whole job: unblocks the peers, who fail with `code`. Never returns control to a collective.
  virtual void abort(int code) noexcept = 0;

 protected:
  Communicator(int rank, int size);

  // What a transport is: groups of its kind, and eight functions of pure movement, behind the checks.
  virtual std::unique_ptr<Communicator> do_split(int color, int key) = 0;
  virtual std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members);  // by do_split
  virtual void do_connect(const std::vector<Route>&) {}  // most are connected from the beginning
  virtual void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) = 0;
  virtual void do_broadcast(TensorView inout, int root, Stream* stream) = 0;
  virtual void do_barrier() = 0;
  virtual Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) = 0;
  virtual Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) = 0;
  virtual Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows,
                                     ConstTensorView in, std::span<const std::int64_t> send_rows,
                                     Stream* stream) = 0;
  virtual Pending do_send(std::span<const ConstTensorView> in, int to, Stream* stream) = 0;
  virtual void do_recv(std::span<const TensorView> out, int from, Stream* stream) = 0;

 private:
  int rank_, size_;
};

std::size_t row_bytes(const ConstTensorView& t);  // of one row of the first dim
std::size_t bytes_together(std::span<const ConstTensorView> tensors);

// Thrown on ranks that are fine because a peer is not; the peer prints.
class PeerError : public Error {
 public:
  PeerError(ExitCode code, const std::string& message) : Error(code, message) {}
};

// Agreement before the next collective: no rank may fail alone. Each rank gives the error it met (empty =
// none); if any rank met one, every rank throws it: the lowest that met one with its message, the others
// with one marked as a peer's failure (empty what()), which `main` does not print. Collective.
void agree(Communicator& comm, ExitCode code, const std::string& local_error);
// Runs `body` and agrees on its outcome: an Error thrown by body on any rank is thrown on all.
void run_agreed(Communicator& comm, const std::function<void()>& body);
// The ranks must have been given the same: `value` (any length, compared by digest) is that of every rank.
// When it is not, rank 0 throws Error(kUsage) that names `what`, the ranks that differ from it, and the first line in
// which the lowest of them does. Collective.
void require_equal(Communicator& comm, const std::string& what, const std::string& value);

}  // namespace upmoe

#include "parallel/thread_comm.h"

#include <condition_variable>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "parallel/reduce.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

using Payload = std::shared_ptr<const std::vector<std::byte>>;

// What all groups of one run share: one lock, and what ends everybody.
struct World {
  std::mutex mutex;
  std::condition_variable changed;
  bool aborted = false;
  ExitCode code = ExitCode::kCommunicator;  // of whoever was first
};

// A verb of a group, from the first rank that gives something to the last that has taken what it wants:
//
//   rank 0   publish ........ collect (waits until arrived = size) - leaves
//   rank 1          publish ........ collect - leaves, the last one: the operation is erased
//
// A rank may publish the next verbs meanwhile: they have other numbers. The number is the rank's own count of verbs, so
// it means the same verb everywhere as long as all ranks call the same ones, which Communicator demands.
struct Operation {
  std::vector<Payload> published;
  std::vector<std::vector<std::int64_t>> rows;  // all_to_all_rows: who sends how many rows to whom
  int arrived = 0, left = 0;
};

struct Group {
  std::shared_ptr<World> world;
  int size = 0;
  std::map<std::uint64_t, Operation> operations;                             // by sequence number
  std::map<std::pair<std::uint64_t, int>, std::shared_ptr<Group>> children;  // by (sequence number, colour)
  std::map<std::pair<int, int>, std::vector<Payload>> mail;                  // by (from, to), oldest first
};

// Receivers share this one copy; the last to drop it frees it.
Payload copy_of(const ConstTensorView& v) {
  auto bytes = std::make_shared<std::vector<std::byte>>(v.bytes());
  if (!bytes->empty()) std::memcpy(bytes->data(), v.data, bytes->size());
  return bytes;
}

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Group> group, int rank)
      : Communicator(rank, group->size), group_(std::move(group)) {}
  void abort(int code) noexcept override { end(*group_->world, static_cast<ExitCode>(code)); }
  static void end(World& world, ExitCode code) noexcept {
    const std::lock_guard lock(world.mutex);
    if (!world.aborted) world.code = code;
    world.aborted = true;
    world.changed.notify_all();
  }

 private:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    const std::int32_t mine[2] = {color, key};
    const std::uint64_t sequence = publish(copy_of(host_view(mine, {2})), {});
    const Operation all = collect(sequence, "split");
    int members = 0, before_me = 0;
    for (int r = 0; r < size(); ++r) {
      std::int32_t theirs[2];
      std::memcpy(theirs, all.published[static_cast<std::size_t>(r)]->data(), sizeof theirs);
      if (theirs[0] != color) continue;
      ++members;
      if (theirs[1] < key || (theirs[1] == key && r < rank())) ++before_me;
    }
    const std::lock_guard lock(group_->world->mutex);
    // The first of a colour to come makes the child, the others find it: (number of the split, colour) is its name.
    std::shared_ptr<Group>& child = group_->children[{sequence, color}];
    if (child == nullptr) {
      child = std::make_shared<Group>();
      child->world = group_->world;
      child->size = members;
    }
    return std::make_unique<ThreadCommunicator>(child, before_me);
  }

  void do_all_reduce(TensorView inout, ReduceOp op, Stream*) override {
    const Operation all = collect(publish(copy_of(inout), {}), "all_reduce");
    reduce_in_order(inout.dtype, op, inout.data, parts(all, 0, inout.bytes()), inout.elements());
  }
  void do_broadcast(TensorView inout, int root, Stream*) override {
    const Operation all = collect(publish(root == rank() ? copy_of(inout) : empty(), {}), "broadcast");
    const Payload& from = all.published[static_cast<std::size_t>(root)];
    UPMOE_CHECK(from->size() == inout.bytes(), "broadcast of {} bytes into {}", from->size(), inout.bytes());
    if (root != rank() && inout.bytes() > 0) std::memcpy(inout.data, from->data(), from->size());
  }
  void do_barrier() override { collect(publish(empty(), {}), "barrier"); }

  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream*) override {
    const std::uint64_t sequence = publish(copy_of(in), {});
    return Pending([this, sequence, out] {
      const Operation all = collect(sequence, "reduce_scatter");
      const std::size_t begin = static_cast<std::size_t>(rank()) * out.bytes();
      reduce_in_order(out.dtype, ReduceOp::kSum, out.data, parts(all, begin, out.bytes()), out.elements());
    });
  }
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream*) override {
    const std::uint64_t sequence = publish(copy_of(in), {});
    return Pending([this, sequence, out, bytes = in.bytes()] {
      const Operation all = collect(sequence, "all_gather");
      const auto from = parts(all, 0, bytes);
      for (std::size_t r = 0; r < from.size() && bytes > 0; ++r)
        std::memcpy(out.data + r * bytes, from[r], bytes);
    });
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream*) override {
    const std::size_t row = row_bytes(in);
    const std::uint64_t sequence = publish(copy_of(in), {send_rows.begin(), send_rows.end()});
    return Pending(
        [this, sequence, out, row, expected = std::vector<std::int64_t>(recv_rows.begin(), recv_rows.end())] {
          receive_rows(collect(sequence, "all_to_all_rows"), out, row, expected);
        });
  }
  Pending do_send(std::span<const ConstTensorView> in, int to, Stream*) override {
    for (const ConstTensorView& t : in) {
      Payload copy = copy_of(t);
      const std::lock_guard lock(group_->world->mutex);
      group_->mail[{rank(), to}].push_back(std::move(copy));
      group_->world->changed.notify_all();
    }
    return {};
  }
  void do_recv(std::span<const TensorView> out, int from, Stream*) override {
    for (const TensorView& t : out) take_letter(t, from);
  }
  void take_letter(const TensorView& out, int from) {
    const watchdog::Watched watched("recv");
    std::unique_lock lock(group_->world->mutex);
    auto& box = group_->mail[{from, rank()}];
    // A map's elements stay where they are while others are added: the reference survives the waiting.
    wait_until(lock, [&] { return !box.empty(); });
    const Payload letter = box.front();
    box.erase(box.begin());
    lock.unlock();
    UPMOE_CHECK(letter->size() == out.bytes(), "rank {} sent {} bytes, {} expected", from, letter->size(),
                out.bytes());
    if (out.bytes() > 0) std::memcpy(out.data, letter->data(), letter->size());
  }

  static Payload empty() { return std::make_shared<const std::vector<std::byte>>(); }

  std::uint64_t publish(Payload payload, std::vector<std::int64_t> rows) {
    const std::uint64_t sequence = next_++;
    const std::lock_guard lock(group_->world->mutex);
    Operation& op = group_->operations[sequence];
    op.published.resize(static_cast<std::size_t>(group_->size));
    op.rows.resize(static_cast<std::size_t>(group_->size));
    op.published[static_cast<std::size_t>(rank())] = std::move(payload);
    op.rows[static_cast<std::size_t>(rank())] = std::move(rows);
    if (++op.arrived == group_->size) group_->world->changed.notify_all();
    return sequence;
  }

  template <class Condition>
  void wait_until(std::unique_lock<std::mutex>& lock, const Condition& condition) {
    group_->world->changed.wait(lock, [&] { return group_->world->aborted || condition(); });
    // What had arrived before the end still counts: then the rank meets the end at its next verb.
    if (!condition()) throw PeerError(group_->world->code, "");
  }

  // A copy of the operation (shared payloads) once everybody arrived; the last to leave removes it.
  Operation collect(std::uint64_t sequence, const char* verb) {
    const watchdog::Watched watched(verb);
    std::unique_lock lock(group_->world->mutex);
    wait_until(lock, [&] { return group_->operations[sequence].arrived == group_->size; });
    Operation& op = group_->operations[sequence];
    Operation mine = op;
    if (++op.left == group_->size) group_->operations.erase(sequence);
    return mine;
  }

  static std::vector<const std::byte*> parts(const Operation& op, std::size_t begin, std::size_t bytes) {
    std::vector<const std::byte*> p;
    for (std::size_t r = 0; r < op.published.size(); ++r) {
      UPMOE_CHECK(begin + bytes <= op.published[r]->size(), "rank {} gave {} bytes, {} wanted", r,
                  op.published[r]->size(), begin + bytes);
      p.push_back(op.published[r]->data() + begin);
    }
    return p;
  }

  void receive_rows(const Operation& op, TensorView out, std::size_t row,
                    const std::vector<std::int64_t>& expected) const {
    std::byte* to = out.data;
    for (std::size_t p = 0; p < op.rows.size(); ++p) {
      const std::vector<std::int64_t>& sent = op.rows[p];
      UPMOE_CHECK(sent.size() == expected.size() && sent[static_cast<std::size_t>(rank())] == expected[p],
                  "rank {} sends {} rows to rank {}, which expects {}", p,
                  sent.empty() ? -1 : sent[static_cast<std::size_t>(rank())], rank(), expected[p]);
      // Rank p's rows lie by receiver: those for the ranks before this one come first.
      std::int64_t before = 0;
      for (int q = 0; q < rank(); ++q) before += sent[static_cast<std::size_t>(q)];
      const std::size_t bytes = static_cast<std::size_t>(expected[p]) * row;
      if (bytes > 0) std::memcpy(to, op.published[p]->data() + static_cast<std::size_t>(before) * row, bytes);
      to += bytes;
    }
  }

  std::shared_ptr<Group> group_;
  std::uint64_t next_ = 0;
};

}  // namespace

void run_in_threads(int ranks, const std::function<void(Communicator&)>& body) {
  UPMOE_CHECK(ranks >= 1, "{} ranks", ranks);
  auto group = std::make_shared<Group>();
  group->world = std::make_shared<World>();
  group->size = ranks;
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(ranks));
  std::vector<char> is_peer_error(static_cast<std::size_t>(ranks));
  std::vector<std::jthread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      ThreadCommunicator comm(group, r);
      const auto i = static_cast<std::size_t>(r);
      try {
        body(comm);
      } catch (const PeerError&) {
        errors[i] = std::current_exception();
        is_peer_error[i] = 1;
      } catch (...) {
        errors[i] = std::current_exception();
      }
      if (errors[i]) ThreadCommunicator::end(*group->world, ExitCode::kCommunicator);
    });
  threads.clear();  // joins
  // Who met an error of its own is told of before those that ended because of it.
  for (const bool peers : {false, true})
    for (std::size_t r = 0; r < errors.size(); ++r)
      if (errors[r] && (is_peer_error[r] != 0) == peers) std::rethrow_exception(errors[r]);
}

}  // namespace upmoe

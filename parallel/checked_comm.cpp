#include "parallel/checked_comm.h"

#include <algorithm>
#include <type_traits>

namespace upmoe {

namespace {

enum class Verb : std::int64_t {
  kSplit,
  kSubgroup,
  kConnect,
  kAllReduce,
  kBroadcast,
  kBarrier,
  kReduceScatter,
  kAllGather,
  kAllToAllRows,
  kSend
};

const char* name_of(Verb verb) {
  switch (verb) {
    case Verb::kSplit:
      return "split";
    case Verb::kSubgroup:
      return "subgroup";
    case Verb::kConnect:
      return "connect";
    case Verb::kAllReduce:
      return "all_reduce";
    case Verb::kBroadcast:
      return "broadcast";
    case Verb::kBarrier:
      return "barrier";
    case Verb::kReduceScatter:
      return "reduce_scatter";
    case Verb::kAllGather:
      return "all_gather";
    case Verb::kAllToAllRows:
      return "all_to_all_rows";
    case Verb::kSend:
      return "send";
  }
  return "unknown";
}

const char* name_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kMax:
      return "max";
    case ReduceOp::kMin:
      return "min";
  }
  return "unknown";
}

// What all ranks must agree on. Travels as int64 words, so there is no padding in it.
struct Call {
  Verb verb = Verb::kBarrier;
  std::int64_t sequence = 0;
  std::int64_t detail = 0;  // the ReduceOp or the root
  std::int64_t dtype = 0, shape_rank = 0;
  std::array<std::int64_t, 4> dim{};

  Call() = default;
  explicit Call(Verb v) : verb(v) {}
  Call(Verb v, const ConstTensorView& t, std::int64_t d = 0)
      : verb(v),
        detail(d),
        dtype(static_cast<std::int64_t>(t.dtype)),
        shape_rank(t.shape.rank),
        dim(t.shape.dim) {}
  friend bool operator==(const Call&, const Call&) = default;
};
constexpr std::int64_t kWords = sizeof(Call) / sizeof(std::int64_t);
static_assert(std::has_unique_object_representations_v<Call>);

TensorView as_words(Call* calls, std::int64_t n) {
  return host_view(reinterpret_cast<std::int64_t*>(calls), {n, kWords});
}

std::string describe(const Call& c) {
  std::string text = name_of(c.verb);
  if (c.verb == Verb::kSplit || c.verb == Verb::kSubgroup || c.verb == Verb::kConnect ||
      c.verb == Verb::kBarrier)
    return text;
  if (c.verb == Verb::kAllReduce) text += fmt::format(" ({})", name_of(static_cast<ReduceOp>(c.detail)));
  if (c.verb == Verb::kBroadcast) text += fmt::format(" from rank {}", c.detail);
  Shape shape;
  shape.rank = static_cast<int>(c.shape_rank);
  shape.dim = c.dim;
  text += fmt::format(" of {}{} {}", c.verb == Verb::kAllToAllRows ? "rows " : "",
                      upmoe::name_of(static_cast<DType>(c.dtype)), shape.str());
  if (c.verb == Verb::kSend && c.detail > 1) text += fmt::format(" (one of {} together)", c.detail);
  return text;
}

class CheckedCommunicator final : public Communicator {
 public:
  explicit CheckedCommunicator(std::unique_ptr<Communicator> inner)
      : Communicator(inner->rank(), inner->size()), inner_(std::move(inner)) {}
  std::unique_ptr<Stream> make_stream() override { return inner_->make_stream(); }
  void abort(int code) noexcept override { inner_->abort(code); }

 private:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    compare(Call(Verb::kSplit));
    return make_checked_communicator(inner_->split(color, key));
  }
  std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members) override {
    compare(Call(Verb::kSubgroup));
    return make_checked_communicator(inner_->subgroup(members));
  }
  void do_connect(const std::vector<Route>& routes) override {
    compare(Call(Verb::kConnect));
    inner_->connect(routes);
  }
  void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    compare(Call(Verb::kAllReduce, inout, static_cast<std::int64_t>(op)));
    inner_->all_reduce(inout, op, stream);
  }
  void do_broadcast(TensorView inout, int root, Stream* stream) override {
    compare(Call(Verb::kBroadcast, inout, root));
    inner_->broadcast(inout, root, stream);
  }
  void do_barrier() override {
    compare(Call(Verb::kBarrier));
    inner_->barrier();
  }
  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    compare(Call(Verb::kReduceScatter, in));
    return inner_->reduce_scatter(out, in, stream);
  }
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    compare(Call(Verb::kAllGather, in));
    return inner_->all_gather(out, in, stream);
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    Call call(Verb::kAllToAllRows, in);
    if (call.shape_rank > 0) call.dim[0] = 1;  // the number of rows is each rank's own
    compare(call);
    compare_rows(recv_rows, send_rows);
    return inner_->all_to_all_rows(out, recv_rows, in, send_rows, stream);
  }
  // The sender tells the receiver what follows.
  Pending do_send(std::span<const ConstTensorView> in, int to, Stream* stream) override {
    // Between two ranks alone, as the others do not know of it: no comparison over the group, and no number.
    for (const ConstTensorView& t : in) {
      Call call(Verb::kSend, t, static_cast<std::int64_t>(in.size()));
      inner_->send(as_words(&call, 1), to).wait();
    }
    return inner_->send(in, to, stream);
  }
  void do_recv(std::span<const TensorView> out, int from, Stream* stream) override {
    for (const TensorView& t : out) {
      const Call expected(Verb::kSend, t, static_cast<std::int64_t>(out.size()));
      Call call = expected;
      inner_->recv(as_words(&call, 1), from);
      if (!(call == expected))
        fail(ExitCode::kCommunicator, "the ranks disagree: rank {} calls {}, rank {} expects a {}", from,
             describe(call), rank(), describe(expected));
    }
    inner_->recv(out, from, stream);
  }

  // Every rank comes here first whatever it is about to call, so this exchange ends even where the verbs differ, which
  // is where the transport itself would wait for ever.
  // Every rank sees the same calls, so all raise the same error.
  void compare(Call mine) {
    mine.sequence = ++sequence_;
    // Begins as if all agreed, for a dry transport, which has no peers to ask and writes nothing.
    std::vector<Call> all(static_cast<std::size_t>(size()), mine);
    inner_->all_gather(as_words(all.data(), size()), as_words(&mine, 1)).wait();
    const auto other = std::find_if(all.begin(), all.end(), [&](const Call& c) { return !(c == all[0]); });
    if (other == all.end()) return;
    fail(ExitCode::kCommunicator,
         "the ranks of a group of {} disagree on what comes next: rank 0 calls {} (number {}), rank {} calls "
         "{} (number {}); every rank must call the same verbs in the same order",
         size(), describe(all[0]), all[0].sequence, other - all.begin(), describe(*other), other->sequence);
  }

  void compare_rows(std::span<const std::int64_t> recv_rows, std::span<const std::int64_t> send_rows) {
    const auto n = static_cast<std::size_t>(size());
    std::vector<std::int64_t> mine(send_rows.begin(), send_rows.end());
    mine.insert(mine.end(), recv_rows.begin(), recv_rows.end());
    std::vector<std::int64_t> all(mine.size() * n);
    const auto words = static_cast<std::int64_t>(mine.size());
    inner_->all_gather(host_view(all.data(), {size() * words}), host_view(mine.data(), {words})).wait();
    for (std::size_t from = 0; from < n; ++from)
      for (std::size_t to = 0; to < n; ++to) {
        // A rank's row of `all`: what it sends to each rank, then what it expects from each.
        const std::int64_t sent = all[from * 2 * n + to], expected = all[to * 2 * n + n + from];
        if (sent != expected)
          fail(ExitCode::kCommunicator,
               "all_to_all_rows (number {}): rank {} sends {} rows to rank {}, which expects {}", sequence_,
               from, sent, to, expected);
      }
  }

  std::unique_ptr<Communicator> inner_;
  std::int64_t sequence_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_checked_communicator(std::unique_ptr<Communicator> comm) {
  UPMOE_CHECK(comm != nullptr, "no communicator to check");
  return std::make_unique<CheckedCommunicator>(std::move(comm));
}

}  // namespace upmoe

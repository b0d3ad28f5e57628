#include "parallel/nccl_comm.h"

#include <algorithm>
#include <limits>

#include "parallel/nccl_channel.h"
#include "parallel/self_comm.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

constexpr std::size_t kSmallReduce = std::size_t{64} << 10;  // bytes; below, everybody sends everything
constexpr std::size_t kStaging = std::size_t{1} << 38;       // of address space; memory comes as it is used

std::string in_words(const std::vector<std::int64_t>& ranks) {
  std::string words;
  for (const std::int64_t r : ranks) words += fmt::format("{}{}", words.empty() ? "" : ", ", r);
  return words;
}

// The ranks of `comm` by their numbers in the world, of which this one is `mine`.
std::vector<std::int64_t> world_ranks(Communicator& comm, std::int64_t mine) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(host_view(all.data(), {comm.size()}), host_view(&mine, {1})).wait();
  return all;
}

TensorView view_of(nccl::Id& id) {
  return host_view(reinterpret_cast<std::int32_t*>(id.data()), {sizeof id / sizeof(std::int32_t)});
}

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, std::shared_ptr<nccl::Progress> progress,
                   std::unique_ptr<nccl::Channel> channel, std::vector<std::int64_t> ranks)
      : Communicator(host->rank(), host->size()),
        host_(std::move(host)),
        progress_(std::move(progress)),
        channel_(std::move(channel)),
        self_(make_self_communicator()),
        ranks_(std::move(ranks)) {}

  // NCCL may wait for the peer when a communicator ends, as when it is made: in one order on both.
  ~NcclCommunicator() override {
    while (!pairs_.empty()) pairs_.pop_back();
  }

  void abort(int code) noexcept override {
    progress_->abort_all();
    host_->abort(code);
  }

 private:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    std::unique_ptr<Communicator> child = host_->split(color, key);
    std::vector<std::int64_t> ranks = world_ranks(*child, ranks_[static_cast<std::size_t>(rank())]);
    std::unique_ptr<nccl::Channel> channel;
    if (channel_ != nullptr) {
      const nccl::Comm comm = channel_->split(child->size() == 1, color, key);
      if (comm != nullptr) channel = std::make_unique<nccl::Channel>(progress_, comm, in_words(ranks));
    }
    return std::make_unique<NcclCommunicator>(std::move(child), progress_, std::move(channel),
                                              std::move(ranks));
  }

  // Every rank goes through the routes in the same order, so that the first one that is not made has nobody to wait for
  // but its two ranks: no circle. Both wait here, where nothing of theirs is under way on the GPU.
  void do_connect(const std::vector<Route>& routes) override {
    for (const auto& [from, to] : routes) {
      if ((from != rank() && to != rank()) || size() == 1) continue;
      const watchdog::Phase phase("making of a channel between two GPUs");
      nccl::Id id{};
      // The sender names the channel, the receiver learns its name over the host.
      if (from == rank()) {
        id = nccl::new_id();
        host_->send(view_of(id), to).wait();
      } else {
        host_->recv(view_of(id), from);
      }
      const std::string ranks =
          in_words({ranks_[static_cast<std::size_t>(from)], ranks_[static_cast<std::size_t>(to)]});
      pairs_.push_back(
          {from, to,
           std::make_unique<nccl::Channel>(progress_, nccl::join(id, 2, from == rank() ? 0 : 1), ranks)});
    }
  }

  void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    if (elsewhere(inout.device)) return elsewhere(inout.device)->all_reduce(inout, op, stream);
    if (inout.bytes() == 0) return;
    channel_
        ->run("all_reduce", stream,
              [&](nccl::Comm comm, Stream& s) {
                // Sums are not left to NCCL, whose order depends on the ring it chose: it moves bytes, and fold_slices
                // sums them in rank order.
                if (inout.bytes() <= kSmallReduce) {
                  reduce_whole(comm, s, inout, op);
                } else {
                  reduce_in_slices(comm, s, inout, op);
                }
              })
        .wait();
  }

  void do_broadcast(TensorView inout, int root, Stream* stream) override {
    if (elsewhere(inout.device)) return elsewhere(inout.device)->broadcast(inout, root, stream);
    if (inout.bytes() == 0) return;
    channel_
        ->run("broadcast", stream,
              [&](nccl::Comm comm, Stream& s) { nccl::broadcast(comm, s, inout.data, inout.bytes(), root); })
        .wait();
  }

  void do_barrier() override { host_->barrier(); }

  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    if (elsewhere(in.device)) return elsewhere(in.device)->reduce_scatter(out, in, stream);
    if (out.bytes() == 0) return {};
    return channel_->run("reduce_scatter", stream, [&](nccl::Comm comm, Stream& s) {
      const std::size_t slice = out.bytes();
      const auto at = [&](int r) { return in.data + static_cast<std::size_t>(r) * slice; };
      exchange_slices(comm, s, slice, at, [&](int) { return slice; });
      gpu::fold_slices(s, ReduceOp::kSum, out.dtype, out.data, staging_->base(), at(rank()), rank(), size(),
                       out.elements());
    });
  }

  Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    if (elsewhere(in.device)) return elsewhere(in.device)->all_gather(out, in, stream);
    if (in.bytes() == 0) return {};
    return channel_->run("all_gather", stream, [&](nccl::Comm comm, Stream& s) {
      nccl::gather(comm, s, out.data, in.data, in.bytes());
    });
  }

  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    if (elsewhere(in.device))
      return elsewhere(in.device)->all_to_all_rows(out, recv_rows, in, send_rows, stream);
    const auto me = static_cast<std::size_t>(rank());
    const std::size_t row = row_bytes(in);
    return channel_->run("all_to_all_rows", stream, [&](nccl::Comm comm, Stream& s) {
      const std::byte* from = in.data;
      std::byte* to = out.data;
      nccl::Group group;
      for (std::size_t p = 0; p < send_rows.size(); ++p) {
        const std::size_t leaving = static_cast<std::size_t>(send_rows[p]) * row,
                          arriving = static_cast<std::size_t>(recv_rows[p]) * row;
        if (p != me) {
          nccl::send(comm, s, from, leaving, static_cast<int>(p));
          nccl::receive(comm, s, to, arriving, static_cast<int>(p));
        } else if (leaving > 0) {
          gpu::copy(s, to, from, leaving);
        }
        from += leaving;
        to += arriving;
      }
      group.end();
    });
  }

  Pending do_send(std::span<const ConstTensorView> in, int to, Stream* stream) override {
    if (elsewhere(in.front().device)) return elsewhere(in.front().device)->send(in, to, stream);
    if (is_empty(in)) return {};
    return pair(rank(), to).run("send", stream, [&](nccl::Comm comm, Stream& s) {
      nccl::Group group;
      for (const ConstTensorView& t : in) nccl::send(comm, s, t.data, t.bytes(), 1);
      group.end();
    });
  }

  void do_recv(std::span<const TensorView> out, int from, Stream* stream) override {
    if (elsewhere(out.front().device)) return elsewhere(out.front().device)->recv(out, from, stream);
    if (is_empty(out)) return;
    pair(from, rank())
        .run("recv", stream,
             [&](nccl::Comm comm, Stream& s) {
               nccl::Group group;
               for (const TensorView& t : out) nccl::receive(comm, s, t.data, t.bytes(), 0);
               group.end();
             })
        .wait();
  }

  template <class View>
  static bool is_empty(std::span<const View> tensors) {
    return std::all_of(tensors.begin(), tensors.end(), [](const View& t) { return t.bytes() == 0; });
  }

  // Who moves tensors of this device, if not NCCL.
  Communicator* elsewhere(Device device) {
    if (device.type != DeviceType::kCuda) return host_.get();
    return size() == 1 ? self_.get() : nullptr;
  }

  // Rank r's part of what rank r' holds at data_for(r), bytes_for(r) long, for all pairs; what arrives for this
  // rank is staged in rank order. Staged memory belongs to the stream: the next verb on it waits for this one.
  template <class DataFor, class BytesFor>
  void exchange_slices(nccl::Comm comm, Stream& s, std::size_t mine, const DataFor& data_for,
                       const BytesFor& bytes_for) {
    std::byte* staged = stage(mine * static_cast<std::size_t>(size()));
    nccl::Group group;
    for (int p = 0; p < size(); ++p) {
      if (p == rank()) continue;
      nccl::send(comm, s, data_for(p), bytes_for(p), p);
      nccl::receive(comm, s, staged + static_cast<std::size_t>(p) * mine, mine, p);
    }
    group.end();
  }

  void reduce_whole(nccl::Comm comm, Stream& s, const TensorView& t, ReduceOp op) {
    std::byte* staged = stage(t.bytes() * static_cast<std::size_t>(size()));
    nccl::gather(comm, s, staged, t.data, t.bytes());
    gpu::fold_slices(s, op, t.dtype, t.data, staged, t.data, rank(), size(), t.elements());
  }

  // Each rank sums a slice, and tells the others.
  void reduce_in_slices(nccl::Comm comm, Stream& s, const TensorView& t, ReduceOp op) {
    const auto begin = [&](int r) { return t.elements() * r / size(); };
    const std::size_t element = size_of(t.dtype);
    const auto at = [&](int r) { return t.data + static_cast<std::size_t>(begin(r)) * element; };
    const auto bytes = [&](int r) { return static_cast<std::size_t>(begin(r + 1) - begin(r)) * element; };
    // As over MPI: slice r to rank r, summed there, and the sum to all. The stream keeps the three steps in order.
    exchange_slices(comm, s, bytes(rank()), at, bytes);
    gpu::fold_slices(s, op, t.dtype, at(rank()), staging_->base(), at(rank()), rank(), size(),
                     begin(rank() + 1) - begin(rank()));
    nccl::Group group;
    for (int p = 0; p < size(); ++p) {
      if (p == rank()) continue;
      nccl::send(comm, s, at(rank()), bytes(rank()), p);
      nccl::receive(comm, s, at(p), bytes(p), p);
    }
    group.end();
  }

  std::byte* stage(std::size_t bytes) {
    if (staging_ == nullptr)
      staging_ = std::make_unique<gpu::Reservation>(kStaging, "sums of ranks " + channel_->ranks());
    // Grows in place: what is under way on the stream keeps its addresses.
    if (bytes > staging_->committed()) staging_->commit(bytes);
    return staging_->base();
  }

  nccl::Channel& pair(int from, int to) {
    for (Pair& p : pairs_)
      if (p.from == from && p.to == to) return *p.channel;
    fail(ExitCode::kFailure, "ranks {} and {} of {} were not connected before a message between their GPUs",
         from, to, size());
  }

  std::unique_ptr<Communicator> host_;
  std::shared_ptr<nccl::Progress> progress_;
  std::unique_ptr<gpu::Reservation> staging_;  // outlives the channel, whose stream uses it
  std::unique_ptr<nccl::Channel> channel_;     // null in a group of one
  std::unique_ptr<Communicator> self_;
  std::vector<std::int64_t> ranks_;  // by their numbers in the world
  // Messages of one rank to another have a channel of their own, in which they keep their order.
  struct Pair {
    int from, to;
    std::unique_ptr<nccl::Channel> channel;
  };
  std::vector<Pair> pairs_;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host) {
  nccl::begin();
  std::vector<std::int64_t> ranks = world_ranks(*host, host->rank());
  auto progress = std::make_shared<nccl::Progress>();
  std::unique_ptr<nccl::Channel> channel;
  if (host->size() > 1) {
    nccl::Id id{};
    run_agreed(*host, [&] {
      if (host->rank() == 0) id = nccl::new_id();
    });
    host->broadcast(view_of(id), 0);
    channel = std::make_unique<nccl::Channel>(progress, nccl::join(id, host->size(), host->rank()),
                                              in_words(ranks));
  }
  return std::make_unique<NcclCommunicator>(std::move(host), std::move(progress), std::move(channel),
                                            std::move(ranks));
}

}  // namespace upmoe

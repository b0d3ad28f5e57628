#include "trainer/diagnosis/link_rates.h"

#include <algorithm>

#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"
#include "parallel/host.h"
#include "trainer/rank_model.h"

namespace upmoe {

namespace {

constexpr std::int64_t kSide = 256;  // of the product that a transfer is tried beside

// The same number on all ranks: the largest.
double slowest(Communicator& world, double mine) {
  world.all_reduce(host_view(&mine, {1}), ReduceOp::kMax);
  return mine;
}

class LinkTrial {
 public:
  LinkTrial(Communicator& world, Communicator& group, RankMemory& memory, const Effort& effort)
      : world_(world), group_(group), ex_(memory.exec), effort_(effort) {}

  // Of `bytes` that every rank has, of which it keeps its own share.
  double all_to_all_seconds(std::int64_t bytes) {
    ScratchScope scope(*ex_.scratch);
    const Exchange e = exchange_of(bytes);
    return timed([&] { group_.all_to_all_rows(e.out, e.rows, e.in, e.rows, ex_).wait(); });
  }
  double all_reduce_seconds(std::int64_t bytes) {
    ScratchScope scope(*ex_.scratch);
    const TensorView t = ex_.scratch->take({bytes / 4}, DType::kF32, "measured");
    ops::fill(ex_, t, 0);  // its own sum, however often
    return timed([&] { group_.all_reduce(t, ReduceOp::kSum, ex_); });
  }
  // The share of computation beside which the exchange of `bytes` got done.
  double overlap(std::int64_t bytes) {
    ScratchScope scope(*ex_.scratch);
    const Exchange e = exchange_of(bytes);
    const TensorView abc = ex_.scratch->take({3 * kSide, kSide}, DType::kF32, "measured");
    fill_random(ex_, abc);
    const double exchange = timed([&] { group_.all_to_all_rows(e.out, e.rows, e.in, e.rows, ex_).wait(); });
    const auto product = [&] {
      ops::gemm(ex_, abc.rows(0, kSide), {abc.rows(kSide, 2 * kSide)},
                {abc.rows(2 * kSide, 3 * kSide), Transpose::kYes}, Accumulate::kOverwrite);
    };
    const int times = std::max(1, static_cast<int>(exchange / timed(product)));
    const auto products = [&] {
      for (int i = 0; i < times; ++i) product();
    };
    const double computation = timed(products);
    const double both = timed([&] {
      Pending sent = group_.all_to_all_rows(e.out, e.rows, e.in, e.rows, ex_);
      products();
      sent.wait();
    });
    return std::clamp((exchange + computation - both) / std::min(exchange, computation), 0.0, 1.0);
  }
  // What leaves a rank of an exchange of `bytes`.
  double sent_of(std::int64_t bytes) const {
    return static_cast<double>(bytes) * (group_.size() - 1) / group_.size();
  }

 private:
  struct Exchange {
    TensorView in, out;
    std::vector<std::int64_t> rows;
  };
  Exchange exchange_of(std::int64_t bytes) {
    const std::int64_t each = std::max<std::int64_t>(1, bytes / 4 / group_.size());
    const Shape shape{each * group_.size()};
    Exchange e{ex_.scratch->take(shape, DType::kF32, "measured"),
               ex_.scratch->take(shape, DType::kF32, "measured"),
               std::vector<std::int64_t>(static_cast<std::size_t>(group_.size()), each)};
    fill_random(ex_, e.in);
    return e;
  }
  // As many times on every rank, whatever it takes each; the mean of them, of the rank that took longest.
  double timed(const std::function<void()>& work) {
    const int times = 1 + 5 * effort_.bursts.count;
    double sum = 0;
    for (int i = 0; i < times; ++i) {
      world_.barrier();
      sum += slowest(world_, times_of(ex_, {}, work).usual);
    }
    return sum / times;
  }

  Communicator &world_, &group_;
  Exec& ex_;
  const Effort& effort_;
};

std::vector<TransferTime> measure(const char* name, LinkTrial& trial, const Effort& effort, int ranks,
                                  Machine::Link& link) {
  std::vector<TransferTime> all;
  for (const std::int64_t bytes : effort.sent_bytes) {
    const double seconds = trial.all_to_all_seconds(bytes);
    all.push_back({name, "all_to_all", bytes, seconds, trial.sent_of(bytes) / seconds});
    link.gb_per_s = std::max(link.gb_per_s, four_digits(all.back().bytes_per_s * 1e-9));
  }
  for (const std::int64_t bytes : effort.sent_bytes) {
    const double seconds = trial.all_reduce_seconds(bytes);
    all.push_back({name, "all_reduce", bytes, seconds, 2 * trial.sent_of(bytes) / seconds});
  }
  link.latency_us = four_digits(trial.all_to_all_seconds(4 * ranks) * 1e6 / (ranks - 1));
  link.overlap = four_digits(trial.overlap(effort.sent_bytes.back()));
  return all;
}

}  // namespace

std::vector<TransferTime> measure_links(Communicator& world, Device device, const Effort& effort,
                                        Machine& machine) {
  const std::vector<std::int64_t> hosts = hosts_of(world);
  const auto me = static_cast<std::size_t>(world.rank());
  const auto rank_of = [&](std::size_t r) {  // among those of its host
    return static_cast<int>(
        std::count(hosts.begin(), hosts.begin() + static_cast<std::ptrdiff_t>(r), hosts[r]));
  };
  const auto first_of = [&](std::size_t r) {
    return static_cast<int>(std::find(hosts.begin(), hosts.end(), hosts[r]) - hosts.begin());
  };
  std::vector<TransferTime> all;
  RankMemory memory(device, &world);
  const auto of_groups = [&](const char* name, int color, Machine::Link& link) {
    const std::unique_ptr<Communicator> group = world.split(color, world.rank());
    // All groups take part in the same measurements, so each must have somebody to send to.
    double least = -group->size();
    world.all_reduce(host_view(&least, {1}), ReduceOp::kMax);
    if (least > -2) return;
    LinkTrial trial(world, *group, memory, effort);
    const std::vector<TransferTime> found = measure(name, trial, effort, group->size(), link);
    all.insert(all.end(), found.begin(), found.end());
  };
  of_groups("inside a host", first_of(me), machine.inside_node);
  of_groups("between hosts", rank_of(me), machine.between_nodes);
  return all;
}

}  // namespace upmoe

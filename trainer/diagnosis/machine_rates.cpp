#include "trainer/diagnosis/machine_rates.h"

#include <algorithm>
#include <string>

#include "kernels/ops/activation.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"
#include "trainer/diagnosis/folder_facts.h"
#include "trainer/diagnosis/link_rates.h"
#include "trainer/diagnosis/warnings.h"
#include "trainer/rank_model.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::int64_t kExperts = 4;
constexpr AttentionShape kAttention{.heads = 8, .kv_heads = 8, .head_dim = 64, .seq_len = 1024};
constexpr std::int64_t kWidth = 1024;  // of a token, in ops that memory bounds
constexpr int kSmallCalls = 1000;

struct Rate {
  double fastest = 0, usual = 0;
};

class Rates {
 public:
  Rates(Communicator& world, Device device, const Effort& effort)
      : world_(world), effort_(effort), memory_(device, &world), ex_(memory_.exec) {
    const Surroundings where = surroundings_of(world);
    // Of ranks that share a host the sum; of GPUs the mean.
    parts_ = device.type == DeviceType::kCpu ? where.hosts : where.ranks;
  }

  std::vector<double> dense(DType dtype) {
    return by_edge([&](std::int64_t edge) { return dense_rate(dtype, edge); });
  }
  std::vector<double> grouped(DType dtype) {
    return by_edge([&](std::int64_t edge) { return grouped_rate(dtype, edge); });
  }
  double dense_peak(DType dtype);  // 10^12 FLOP/s
  void attention(DType dtype, double& forward, double& backward);
  Rate sum();           // bytes/s
  Rate bound();         // bytes/s
  double small_call();  // seconds
  double skew();

 private:
  // What `work` is booked as (FLOPs, or bytes read and written) per second, of all ranks.
  template <class Booked>
  Rate rate(const std::function<void()>& work, Booked booked) {
    Ledger ledger;
    ex_.ledger = &ledger;
    work();
    const double once = booked(ledger.total());
    ex_.ledger = nullptr;
    const RunTimes seconds = times_of(ex_, effort_.bursts, work);
    ex_.ledger = &memory_.ledger;
    return {.fastest = together(once / seconds.fastest), .usual = together(once / seconds.usual)};
  }
  Rate bytes_rate(const std::function<void()>& work) {
    return rate(work, [](const Cost& c) { return c.bytes_read + c.bytes_written; });
  }
  double flops_rate(const std::function<void()>& work) {
    return rate(work, [](const Cost& c) { return c.flops; }).usual;
  }
  double together(double mine) {
    world_.all_reduce(host_view(&mine, {1}), ReduceOp::kSum);
    return mine / parts_;
  }
  // 10^12 FLOP/s at each edge.
  std::vector<double> by_edge(const std::function<double(std::int64_t)>& rate_at) {
    std::vector<double> rates;
    for (const double edge : edges()) {
      world_.barrier();
      rates.push_back(four_digits(rate_at(static_cast<std::int64_t>(edge)) * 1e-12));
    }
    return rates;
  }
  const std::vector<double>& edges() const {
    return ex_.device.type == DeviceType::kCpu ? effort_.edges_on_cpu : effort_.edges_on_gpu;
  }
  TensorView space(Shape shape, DType dtype) { return ex_.scratch->take(shape, dtype, "measured"); }
  TensorView random(Shape shape, DType dtype) {
    const TensorView t = space(shape, dtype);
    fill_random(ex_, t);
    return t;
  }
  // So many sets of operands that no cache keeps one until its turn comes again.
  std::int64_t sets_of(std::int64_t elements, DType dtype) const {
    const auto bytes = static_cast<std::int64_t>(size_of(dtype)) * elements;
    return std::max<std::int64_t>(1, 12 * effort_.copied_elements / bytes);
  }
  double dense_rate(DType dtype, std::int64_t edge);
  double grouped_rate(DType dtype, std::int64_t edge);

  Communicator& world_;
  const Effort& effort_;
  RankMemory memory_;
  Exec& ex_;
  double parts_ = 1;
};

// A layer's three products, forward and backward.
double Rates::dense_rate(DType dtype, std::int64_t edge) {
  ScratchScope scope(*ex_.scratch);
  const std::int64_t sets = sets_of(6 * edge * edge, dtype);
  const Shape shape{sets * edge, edge};
  const TensorView x = random(shape, dtype), w = random(shape, dtype), dy = random(shape, dtype),
                   y = space(shape, dtype), dx = space(shape, dtype), dw = space(shape, dtype);
  return flops_rate([&] {
    for (std::int64_t i = 0; i < sets; ++i) {
      const auto part = [&](const TensorView& all) { return all.rows(i * edge, (i + 1) * edge); };
      ops::gemm(ex_, part(y), {part(x)}, {part(w), Transpose::kYes}, Accumulate::kOverwrite);
      ops::gemm(ex_, part(dx), {part(dy)}, {part(w)}, Accumulate::kOverwrite);
      ops::gemm(ex_, part(dw), {part(dy), Transpose::kYes}, {part(x)}, Accumulate::kOverwrite);
    }
  });
}

double Rates::dense_peak(DType dtype) {
  Exec quiet = ex_;
  quiet.ledger = nullptr;
  const std::vector<double> rates = by_edge([&](std::int64_t edge) {
    const ProductSize cube{edge, edge, edge};
    return together(cube.flops() / seconds_of_product(quiet, dtype, cube, effort_.bursts));
  });
  return *std::max_element(rates.begin(), rates.end());
}

double Rates::grouped_rate(DType dtype, std::int64_t edge) {
  ScratchScope scope(*ex_.scratch);
  const std::int64_t rows = kExperts * edge, sets = sets_of(6 * rows * edge, dtype);
  const Shape shape{sets * rows, edge}, weights{sets * kExperts, edge, edge};
  const TensorView x = random(shape, dtype), w = random(weights, dtype), dy = random(shape, dtype),
                   y = space(shape, dtype), dx = space(shape, dtype), dw = space(weights, dtype);
  std::vector<std::int64_t> offsets;
  std::vector<std::int32_t> offsets_32;
  for (std::int64_t e = 0; e <= kExperts; ++e) {
    offsets.push_back(e * edge);
    offsets_32.push_back(static_cast<std::int32_t>(e * edge));
  }
  const TensorView offset_e1 = space({kExperts + 1}, DType::kI32);
  ops::upload(ex_, offset_e1, host_view(offsets_32.data(), {kExperts + 1}));
  const ExpertRows of{offset_e1, offsets};
  return flops_rate([&] {
    for (std::int64_t i = 0; i < sets; ++i) {
      const auto part = [&](const TensorView& all) { return all.rows(i * rows, (i + 1) * rows); };
      const auto expert = [&](const TensorView& all) { return all.rows(i * kExperts, (i + 1) * kExperts); };
      ops::grouped_gemm_forward(ex_, part(y), part(x), expert(w), of);
      ops::grouped_gemm_dgrad(ex_, part(dx), part(dy), expert(w), of);
      ops::grouped_gemm_wgrad(ex_, expert(dw), part(dy), part(x), of, Accumulate::kOverwrite);
    }
  });
}

void Rates::attention(DType dtype, double& forward, double& backward) {
  ScratchScope scope(*ex_.scratch);
  const std::int64_t S = kAttention.seq_len, Q = kAttention.heads * kAttention.head_dim;
  // As many sequences at once: one alone takes a GPU less time than its launch, and leaves most of it idle.
  const std::int64_t T = S * sets_of(2 * S * (kAttention.qkv_width() + Q), dtype);
  const TensorView qkv_TH = random({T, kAttention.qkv_width()}, dtype), dout_TQ = random({T, Q}, dtype);
  const TensorView out_TQ = space({T, Q}, dtype), lse_TN = space({T, kAttention.heads}, DType::kF32),
                   dqkv_TH = space({T, kAttention.qkv_width()}, dtype);
  world_.barrier();
  forward = four_digits(1e-12 *
                        flops_rate([&] { ops::attention_forward(ex_, out_TQ, lse_TN, qkv_TH, kAttention); }));
  world_.barrier();
  backward =
      four_digits(1e-12 * flops_rate([&] {
                    ops::attention_backward(ex_, dqkv_TH, dout_TQ, qkv_TH, {out_TQ, lse_TN}, kAttention);
                  }));
}

Rate Rates::sum() {
  ScratchScope scope(*ex_.scratch);
  const std::int64_t n = effort_.copied_elements;
  const TensorView a = random({n}, DType::kF32), b = random({n}, DType::kF32), c = space({n}, DType::kF32);
  world_.barrier();
  return bytes_rate([&] { ops::add(ex_, c, a, b); });
}

// Of a layer's ops that memory bounds, and of the optimizer's. All but the sum compute as well, some of them so much
// that a fast memory waits for them.
Rate Rates::bound() {
  ScratchScope scope(*ex_.scratch);
  const std::int64_t D = kWidth, T = effort_.copied_elements / D;
  const DType f32 = DType::kF32;
  const TensorView x_TD = random({T, D}, f32), dy_TD = random({T, D}, f32),
                   gate_up_TG = random({T, 2 * D}, f32), w_D = random({D}, f32), y_TD = space({T, D}, f32),
                   dx_TD = space({T, D}, f32), dgate_up_TG = space({T, 2 * D}, f32), rstd_T = space({T}, f32),
                   dw_D = space({D}, f32), m_TD = space({T, D}, f32), v_TD = space({T, D}, f32);
  ops::fill(ex_, m_TD, 0);
  ops::fill(ex_, v_TD, 0);
  const NormWeight weight{w_D};
  const auto flat = [](const TensorView& t) { return t.reshape({t.elements()}); };
  world_.barrier();
  return bytes_rate([&] {
    ops::rms_norm_forward(ex_, y_TD, rstd_T, x_TD, weight);
    ops::rms_norm_backward(ex_, dx_TD, {dw_D}, dy_TD, {x_TD, rstd_T}, weight, Accumulate::kOverwrite);
    ops::swiglu_forward(ex_, y_TD, gate_up_TG);
    ops::swiglu_backward(ex_, dgate_up_TG, {}, dy_TD, gate_up_TG);
    ops::add(ex_, y_TD, x_TD, dy_TD);
    ops::adamw(ex_, flat(x_TD), flat(x_TD), flat(m_TD), flat(v_TD), flat(dx_TD), {.lr = 0});
  });
}

double Rates::small_call() {
  ScratchScope scope(*ex_.scratch);
  const TensorView a = random({16}, DType::kF32);
  world_.barrier();
  const auto work = [&] {
    for (int i = 0; i < kSmallCalls; ++i) ops::add(ex_, a, a, a);
  };
  double seconds = times_of(ex_, effort_.bursts, work).usual / kSmallCalls;
  world_.all_reduce(host_view(&seconds, {1}), ReduceOp::kSum);
  return seconds / world_.size();
}

// Rounds of some milliseconds that are the same work on every rank, as between two exchanges of a layer.
double Rates::skew() {
  if (world_.size() == 1) return 0;
  ScratchScope scope(*ex_.scratch);
  const auto edge = static_cast<std::int64_t>(edges().back());
  const std::int64_t n = effort_.copied_elements;
  const TensorView a = random({edge, edge}, DType::kF32), b = space({edge, edge}, DType::kF32),
                   c = random({n}, DType::kF32), d = space({n}, DType::kF32);
  const auto work = [&] {
    ops::gemm(ex_, b, {a}, {a}, Accumulate::kOverwrite);
    ops::add(ex_, d, c, c);
  };
  double mean = 0, last = 0;
  for (int round = 0; round < 1 + 40 * effort_.bursts.count; ++round) {
    world_.barrier();
    double seconds = times_of(ex_, {}, work).usual, longest = seconds;
    world_.all_reduce(host_view(&seconds, {1}), ReduceOp::kSum);
    world_.all_reduce(host_view(&longest, {1}), ReduceOp::kMax);
    mean += seconds / world_.size();
    last += longest;
  }
  return last / mean - 1;
}

// Of all ranks of a host together, each with a share of `bytes`, in the mean over hosts.
double disk_rate(Communicator& world, const fs::path& folder, std::uint64_t bytes) {
  const Surroundings where = surroundings_of(world);
  double rate = 0;
  world.barrier();
  run_agreed(world, [&] {
    rate = try_folder(folder, bytes / static_cast<std::uint64_t>(where.ranks_here), world.rank())
               .write_bytes_per_s;
  });
  world.all_reduce(host_view(&rate, {1}), ReduceOp::kSum);
  return rate / where.hosts;
}

}  // namespace

double four_digits(double x) {
  return std::stod(fmt::format("{:.4g}", x));
}

MeasuredMachine measure_machine(Communicator& world, Device device, const fs::path& folder,
                                const Effort& effort, const std::function<void(const std::string&)>& tell) {
  MeasuredMachine measured;
  Machine& m = measured.machine;
  Machine::Rates& r = m.rates;
  {
    Rates rates(world, device, effort);
    r.edges = device.type == DeviceType::kCpu ? effort.edges_on_cpu : effort.edges_on_gpu;
    tell("products");
    r.gemm_bf16 = rates.dense(DType::kBF16);
    r.gemm_fp32 = rates.dense(DType::kF32);
    tell("products of experts");
    r.grouped_bf16 = rates.grouped(DType::kBF16);
    r.grouped_fp32 = rates.grouped(DType::kF32);
    tell("attention");
    rates.attention(DType::kBF16, r.attention_forward_bf16, r.attention_backward_bf16);
    rates.attention(DType::kF32, r.attention_forward_fp32, r.attention_backward_fp32);
    tell("memory");
    const Rate bound = rates.bound();
    m.memory_gb_per_s = four_digits(std::max(rates.sum().fastest, bound.fastest) * 1e-9);
    r.copy_gb_per_s = four_digits(bound.usual * 1e-9);
    r.op_us = four_digits(rates.small_call() * 1e6);
    r.skew = four_digits(rates.skew());
    tell("peaks");
    const auto peak = [&](DType dtype, const std::vector<double>& one, const std::vector<double>& other) {
      return std::max({rates.dense_peak(dtype), *std::max_element(one.begin(), one.end()),
                       *std::max_element(other.begin(), other.end())});
    };
    m.bf16_tflops = peak(DType::kBF16, r.gemm_bf16, r.grouped_bf16);
    m.fp32_tflops = peak(DType::kF32, r.gemm_fp32, r.grouped_fp32);
  }
  m.shared_by_ranks = device.type == DeviceType::kCpu;
  tell("disk");
  m.disk_gb_per_s = four_digits(disk_rate(world, folder, effort.disk_bytes) * 1e-9);
  if (world.size() > 1) tell("links");
  measured.transfers = measure_links(world, device, effort, m);
  return measured;
}

}  // namespace upmoe

#include "trainer/plan/rank_speed.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/check.h"

namespace upmoe {

namespace {

// m, n and k of a product have 2mnk operations and mk + nk + mn elements: their quotient gives 1/m + 1/n + 1/k.
double edge_of(const Cost& cost, double element_bytes) {
  const double elements = (cost.bytes_read + cost.bytes_written) / element_bytes;
  return elements > 0 ? 1.5 * cost.flops / elements : 0;
}

}  // namespace

std::vector<std::string> missing_keys(const Machine& machine, Precision precision, int ranks) {
  const Machine::Rates& r = machine.rates;
  std::vector<std::string> missing;
  const auto need = [&](bool there, const char* key) {
    if (!there) missing.emplace_back(key);
  };
  need(!r.edges.empty(), "rates.edges");
  if (precision == Precision::kBf16) {
    need(!r.gemm_bf16.empty(), "rates.gemm_bf16");
    need(!r.grouped_bf16.empty(), "rates.grouped_bf16");
    need(r.attention_forward_bf16 > 0, "rates.attention_forward_bf16");
    need(r.attention_backward_bf16 > 0, "rates.attention_backward_bf16");
  } else {
    need(machine.fp32_tflops > 0, "fp32_tflops");
    need(!r.gemm_fp32.empty(), "rates.gemm_fp32");
    need(!r.grouped_fp32.empty(), "rates.grouped_fp32");
    need(r.attention_forward_fp32 > 0, "rates.attention_forward_fp32");
    need(r.attention_backward_fp32 > 0, "rates.attention_backward_fp32");
  }
  need(r.copy_gb_per_s > 0, "rates.copy_gb_per_s");
  need(ranks == 1 || machine.ranks_per_node == 1 || machine.inside_node.gb_per_s > 0, "inside_node.gb_per_s");
  need(ranks <= machine.ranks_per_node || machine.between_nodes.gb_per_s > 0, "between_nodes.gb_per_s");
  return missing;
}

RankSpeed::RankSpeed(const Machine& machine, Precision precision, int ranks)
    : machine_(machine),
      precision_(precision),
      ranks_per_node_(std::min(machine.ranks_per_node, ranks)),
      share_(machine.shared_by_ranks ? 1.0 / ranks_per_node_ : 1.0) {
  const std::vector<std::string> missing = missing_keys(machine, precision, ranks);
  if (!missing.empty())
    fail(ExitCode::kUsage,
         "the machine {} says no {}, which a plan of {} rank{} in {} needs; docs/plan.md has every key",
         machine.name, fmt::join(missing, ", "), ranks, ranks == 1 ? "" : "s", name_of(precision));
}

double RankSpeed::peak_flops_per_s() const {
  return (precision_ == Precision::kBf16 ? machine_.bf16_tflops : machine_.fp32_tflops) * 1e12 * share_;
}

double RankSpeed::memory_bytes() const {
  return (machine_.usable_gb > 0 ? machine_.usable_gb : machine_.memory_gb) * 1e9 * share_;
}

double RankSpeed::product_rate(const std::vector<double>& rates, double edge) const {
  const std::vector<double>& edges = machine_.rates.edges;
  const double tera = 1e12 * share_;
  if (edge >= edges.back()) return rates.back() * tera;
  if (edge <= edges.front()) return rates.front() * tera * edge / edges.front();
  const auto above =
      static_cast<std::size_t>(std::upper_bound(edges.begin(), edges.end(), edge) - edges.begin());
  const double part = std::log(edge / edges[above - 1]) / std::log(edges[above] / edges[above - 1]);
  return (rates[above - 1] + part * (rates[above] - rates[above - 1])) * tera;
}

double RankSpeed::flops_per_s(Work work, const Cost& cost) const {
  const Machine::Rates& r = machine_.rates;
  const bool bf16 = precision_ == Precision::kBf16;
  const double edge = edge_of(cost, bf16 ? 2 : 4), tera = 1e12 * share_;
  switch (work) {
    case Work::kProduct:
      return product_rate(bf16 ? r.gemm_bf16 : r.gemm_fp32, edge);
    case Work::kGroupedProducts:
      return product_rate(bf16 ? r.grouped_bf16 : r.grouped_fp32, edge);
    case Work::kAttention:
      return tera * (bf16 ? r.attention_forward_bf16 : r.attention_forward_fp32);
    case Work::kAttentionBackward:
      return tera * (bf16 ? r.attention_backward_bf16 : r.attention_backward_fp32);
    case Work::kOther:
    case Work::kRowSums:
      return std::numeric_limits<double>::infinity();
  }
  fail(ExitCode::kFailure, "no work of this kind");
}

double RankSpeed::op_seconds(Work work, const Cost& cost) const {
  const double bytes = cost.bytes_read + cost.bytes_written;
  const double products = cost.flops > 0 ? cost.flops / flops_per_s(work, cost) : 0;
  return call_seconds() + std::max(products, bytes / (machine_.rates.copy_gb_per_s * 1e9 * share_));
}

}  // namespace upmoe

// The router: softmax, the choice of experts and its derivative, and the sums behind the balance terms. One
// warp has one token; a lane has every 32nd expert.

#include "kernels/ops/routing.h"

#include "kernels/cuda/portable/router_lanes.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

struct Routed {
  float *probs, *weight, *lse;
  std::int32_t* index;
};

// The warp's largest value that is left and its expert; the lowest expert among equals.
template <int N>
__device__ Best largest_left(const float (&value)[N], int lane) {
  // -3 is what stands behind the last expert, so any expert is better than this, one with a NaN (-1) or one that is
  // chosen already (-2) as well.
  Best best{-3.0f, 1 << 30};
#pragma unroll
  for (int i = 0; i < N; ++i) best = better(best, {value[i], i * kWarp + lane});
  return best_of_warp(best);
}

// Takes the k largest of `value` one after the other. NaNs come last: what is chosen is always an expert.
template <int N>
__device__ void choose(const Routed& out, float (&value)[N], std::int64_t token, int lane, int k,
                       bool renormalize) {
  float selected = 0;
  for (int j = 0; j < k; ++j) {
    const Best best = largest_left(value, lane);
#pragma unroll
    for (int i = 0; i < N; ++i)
      // All lanes know the chosen expert; the one that has it takes it out. A loop over constants: an index would put
      // value[] into memory.
      if (i * kWarp + lane == best.expert) value[i] = -2.0f;
    selected += best.value;
    if (lane != 0) continue;
    out.index[token * k + j] = best.expert;
    out.weight[token * k + j] = best.value;
  }
  if (!renormalize) return;
  // Lane 0 wrote the weights that all lanes now divide.
  __syncwarp();
  for (int j = lane; j < k; j += kWarp) out.weight[token * k + j] /= selected;
}

template <int N>
__global__ void route(Routed out, const float* logits, std::int64_t tokens, int experts, int k,
                      bool renormalize, FindingWords findings) {
  const std::int64_t t = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (t >= tokens) return;
  float value[N], largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    value[i] = e < experts ? logits[t * experts + e] : -INFINITY;
    if (e < experts && !isfinite(value[i])) find(findings, Finding::kLogit, t, static_cast<std::uint32_t>(e));
    largest = fmaxf(largest, value[i]);
  }
  largest = warp_max(largest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    value[i] = i * kWarp + lane < experts ? expf(value[i] - largest) : 0.0f;
    sum += value[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    value[i] /= sum;
    if (e < experts) out.probs[t * experts + e] = value[i];
    if (e >= experts || isnan(value[i])) value[i] = e < experts ? -1.0f : -3.0f;
  }
  if (lane == 0) out.lse[t] = largest + logf(sum);
  choose(out, value, t, lane, k, renormalize);
}

struct RouteGradient {
  float* dlogits;
  const float *dweight, *aux, *probs, *weight, *lse;
  const std::int32_t *index, *aux_row;
  float z_scale;
};

// With p = softmax(logits): dlogit_e = p_e (dp_e - sum_j p_j dp_j) + 2 z_scale lse p_e, where
// dp_e = aux_e + [e selected as k] dp_k;  dp_k = dweight_k, or with renormalised weights w_k = p_k / s:
// dp_k = (dweight_k - sum_j dweight_j w_j) / s.
template <int N>
__global__ void route_backward(RouteGradient g, std::int64_t tokens, int experts, int k, bool renormalize) {
  const std::int64_t t = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (t >= tokens) return;
  float selected = 1, shift = 0;
  if (renormalize) {
    selected = 0;
    for (int j = 0; j < k; ++j) {
      if (g.index[t * k + j] < 0) continue;
      selected += g.probs[t * experts + g.index[t * k + j]];
      shift += g.dweight[t * k + j] * g.weight[t * k + j];
    }
  }
  const float* aux = g.aux_row == nullptr ? g.aux : g.aux + static_cast<std::int64_t>(g.aux_row[t]) * experts;
  float p[N], dp[N], dot = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    p[i] = e < experts ? g.probs[t * experts + e] : 0.0f;
    dp[i] = e < experts ? aux[e] : 0.0f;
    for (int j = 0; j < k; ++j)
      if (g.index[t * k + j] == e) dp[i] += (g.dweight[t * k + j] - shift) / selected;
    dot += p[i] * dp[i];
  }
  const float offset = 2.0f * g.z_scale * g.lse[t] - warp_sum(dot);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    if (e < experts) g.dlogits[t * experts + e] = p[i] * (dp[i] + offset);
  }
}

constexpr int kStatTokens = 32;  // summed by one warp, one after the other

// partial[column][warp] of the columns of balance_stats: E counts, E counts of first choices, E sums of
// probabilities, and the sum of lse^2.
__global__ void partial_stats(double* partial, const float* probs, const std::int32_t* index,
                              const float* lse, std::int64_t tokens, std::int64_t warps, int experts, int k) {
  const std::int64_t warp = global_thread() / kWarp, first = warp * kStatTokens;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp >= warps) return;
  const std::int64_t last = first + kStatTokens < tokens ? first + kStatTokens : tokens;
  for (int e = lane; e < experts; e += kWarp) {
    double sum = 0;
    int assigned = 0, first_choice = 0;
    for (std::int64_t t = first; t < last; ++t) {
      sum += static_cast<double>(probs[t * experts + e]);
      first_choice += index[t * k] == e;
      for (int j = 0; j < k; ++j) assigned += index[t * k + j] == e;
    }
    partial[e * warps + warp] = assigned;
    partial[(experts + e) * warps + warp] = first_choice;
    partial[(2 * experts + e) * warps + warp] = sum;
  }
  if (lane != 0) return;
  double squares = 0;
  for (std::int64_t t = first; t < last; ++t)
    squares += static_cast<double>(lse[t]) * static_cast<double>(lse[t]);
  partial[3 * experts * warps + warp] = squares;
}

// One block, one column.
__global__ void add_stats(double* stats, double* z, const double* partial, std::int64_t warps) {
  __shared__ double memory[kThreads / kWarp];
  const double* column = partial + static_cast<std::int64_t>(blockIdx.x) * warps;
  double sum = 0;
  for (std::int64_t w = threadIdx.x; w < warps; w += kThreads) sum += column[w];
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) *(blockIdx.x + 1 < gridDim.x ? stats + blockIdx.x : z) = sum;
}

// One block has one row of tokens and 32 experts: a warp's lanes are experts, the warps take turns at the tokens.
__global__ void add_row_stats(double* stats, const float* probs, const std::int32_t* index,
                              const std::int32_t* row, std::int64_t tokens, int experts, int k) {
  __shared__ double assigned[kThreads], summed[kThreads];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int e = static_cast<int>(blockIdx.y) * kWarp + lane, b = static_cast<int>(blockIdx.x);
  double count = 0, sum = 0;
  for (std::int64_t t = warp; t < tokens && e < experts; t += kThreads / kWarp) {
    if (row[t] != b) continue;
    sum += static_cast<double>(probs[t * experts + e]);
    for (int j = 0; j < k; ++j) count += index[t * k + j] == e;
  }
  assigned[threadIdx.x] = count;
  summed[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || e >= experts) return;
  for (int w = 1; w < kThreads / kWarp; ++w) {
    count += assigned[w * kWarp + lane];
    sum += summed[w * kWarp + lane];
  }
  stats[static_cast<std::int64_t>(b) * experts + e] = count;
  stats[(static_cast<std::int64_t>(gridDim.x) + b) * experts + e] = sum;
}

}  // namespace

void row_balance_stats(Exec& ex, TensorView stats_2BE, ConstTensorView probs_TE, ConstTensorView index_TK,
                       ConstTensorView row_T) {
  const std::int64_t experts = probs_TE.shape[1];
  launch(ex, dim3(static_cast<unsigned>(stats_2BE.shape[1]), blocks_for(experts, kWarp)), kThreads,
         add_row_stats, stats_2BE.as<double>(), probs_TE.as<float>(), index_TK.as<std::int32_t>(),
         row_T.as<std::int32_t>(), probs_TE.shape[0], static_cast<int>(experts),
         static_cast<int>(index_TK.shape[1]));
}

void route_tokens(Exec& ex, TensorView probs_TE, TensorView index_TK, TensorView weight_TK, TensorView lse_T,
                  ConstTensorView logits_TE, bool renormalize) {
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1];
  const Routed out{probs_TE.as<float>(), weight_TK.as<float>(), lse_T.as<float>(),
                   index_TK.as<std::int32_t>()};
  with_experts_per_lane(experts, [&](auto n) {
    launch(ex, blocks_for(tokens, kThreads / kWarp), kThreads, route<n.value>, out, logits_TE.as<float>(),
           tokens, static_cast<int>(experts), static_cast<int>(index_TK.shape[1]), renormalize,
           stream_of(ex).findings());
  });
}

void route_tokens_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                           const TermGradient& terms, const Routes& routes, bool renormalize) {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1];
  RouteGradient g{};
  g.dlogits = dlogits_TE.as<float>();
  g.dweight = dweight_TK.as<float>();
  g.aux = terms.aux.as<float>();
  g.probs = probs_TE.as<float>();
  g.weight = weight_TK.as<float>();
  g.lse = lse_T.as<float>();
  g.index = index_TK.as<std::int32_t>();
  g.aux_row = terms.row_T.given() ? terms.row_T.as<std::int32_t>() : nullptr;
  g.z_scale = terms.z_scale;
  with_experts_per_lane(experts, [&](auto n) {
    launch(ex, blocks_for(tokens, kThreads / kWarp), kThreads, route_backward<n.value>, g, tokens,
           static_cast<int>(experts), static_cast<int>(index_TK.shape[1]), renormalize);
  });
}

void balance_stats(Exec& ex, TensorView stats_3E, TensorView z_1, ConstTensorView probs_TE,
                   ConstTensorView index_TK, ConstTensorView lse_T) {
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1];
  const std::int64_t warps = blocks_for(tokens, kStatTokens), columns = 3 * experts + 1;
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({columns, warps}, DType::kF64, "balance_stats").as<double>();
  launch(ex, blocks_for(warps, kThreads / kWarp), kThreads, partial_stats, partial, probs_TE.as<float>(),
         index_TK.as<std::int32_t>(), lse_T.as<float>(), tokens, warps, static_cast<int>(experts),
         static_cast<int>(index_TK.shape[1]));
  launch(ex, static_cast<unsigned>(columns), kThreads, add_stats, stats_3E.as<double>(), z_1.as<double>(),
         partial, warps);
}

}  // namespace upmoe::cuda

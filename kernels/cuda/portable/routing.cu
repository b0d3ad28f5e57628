// The router: softmax, the choice of experts and its derivative, and the sums behind the balance terms. One
// warp has one token; a lane has every 32nd expert.

#include "kernels/ops/routing.h"

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// A lane's values are registers, so how many there are is a constant of the kernel:
//
//   lane        0      1     ...   31
//   value[0]   e 0    e 1    ...  e 31
//   value[1]   e 32   e 33   ...  e 63
//   ...                                  behind the last expert: nothing that could be chosen
//
// body(std::integral_constant<int, N>) with the least N whose warps hold `experts`.
template <class Body>
void with_experts_per_lane(std::int64_t experts, Body&& body) {
  if (experts <= kWarp * 2) return body(std::integral_constant<int, 2>{});
  if (experts <= kWarp * 8) return body(std::integral_constant<int, 8>{});
  UPMOE_CHECK(experts <= kWarp * 32, "{} experts, at most {} on a GPU", experts, kWarp * 32);
  body(std::integral_constant<int, 32>{});
}

struct Routed {
  float *probs, *weight, *lse;
  std::int32_t* index;
};

// The lane's largest value that is left and its expert; the lowest expert among equals.
struct Best {
  float value;
  int expert;
};
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.expert < a.expert) ? b : a;
}
template <int N>
__device__ Best largest_left(const float (&value)[N], int lane) {
  // -3 is what stands behind the last expert, so any expert is better than this, one with a NaN (-1) or one that is
  // chosen already (-2) as well. The butterfly leaves the same best in every lane, whatever its own were.
  Best best{-3.0f, 1 << 30};
#pragma unroll
  for (int i = 0; i < N; ++i) best = better(best, {value[i], i * kWarp + lane});
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    best = better(best, {__shfl_xor_sync(kAllLanes, best.value, lanes),
                         __shfl_xor_sync(kAllLanes, best.expert, lanes)});
  return best;
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
  const std::int32_t* index;
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
      selected += g.probs[t * experts + g.index[t * k + j]];
      shift += g.dweight[t * k + j] * g.weight[t * k + j];
    }
  }
  float p[N], dp[N], dot = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    p[i] = e < experts ? g.probs[t * experts + e] : 0.0f;
    dp[i] = e < experts ? g.aux[e] : 0.0f;
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

}  // namespace

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

void route_tokens_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK, ConstTensorView aux_E,
                           float z_scale, const Routes& routes, bool renormalize) {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  const std::int64_t tokens = probs_TE.shape[0], experts = probs_TE.shape[1];
  const RouteGradient g{
      dlogits_TE.as<float>(), dweight_TK.as<float>(), aux_E.as<float>(),           probs_TE.as<float>(),
      weight_TK.as<float>(),  lse_T.as<float>(),      index_TK.as<std::int32_t>(), z_scale};
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

// The sorted order of the routed rows, and moving rows in it.

#include <algorithm>
#include <bit>

#include "kernels/core/exchange_nodes.h"
#include "kernels/cuda/portable/counting_sort.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/routing.h"

namespace upmoe::cuda {

namespace {

// By value in the launch.
struct Begins {
  std::int64_t at[kMostNodesOfAGpu + 1];
};

Begins begins_of(std::span<const std::int64_t> values) {
  UPMOE_CHECK(values.size() <= kMostNodesOfAGpu + 1, "{} nodes, at most {} on a GPU", values.size() - 1,
              kMostNodesOfAGpu);
  Begins b{};
  std::copy(values.begin(), values.end(), b.at);
  return b;
}

__global__ void expand(std::int32_t* out, const std::int32_t* index, const std::int32_t* piece,
                       std::int64_t choices, std::int64_t pieces, std::int64_t experts,
                       FindingWords findings) {
  const std::int64_t i = global_thread();
  if (i >= choices * pieces) return;
  const std::int32_t e = index[i / pieces];
  if (e < -1 || e >= experts) find(findings, Finding::kIndex, i / pieces, static_cast<std::uint32_t>(e));
  out[i] = e >= 0 && e < experts ? piece[e * pieces + i % pieces] : -1;
}

// The key of a choice is its expert: sorted, the rows of an expert lie together, in the order of tokens. Rows are
// gathered by `order`; by `slot`, its inverse, a token finds its rows afterwards.
struct ExpertKey {
  const std::int32_t* index;
  std::int64_t experts;
  FindingWords findings;
  __device__ std::int32_t operator()(std::int64_t i) const {
    const std::int32_t e = index[i];
    if (e >= -1 && e < experts) return e;
    find(findings, Finding::kIndex, i, static_cast<std::uint32_t>(e));
    return -1;
  }
};
struct OrderAndSlot {
  std::int32_t *order, *slot;
  std::int64_t divisor;  // what order holds of item i: i / divisor
  __device__ void operator()(std::int64_t i, std::int32_t place) const {
    slot[i] = place;
    if (place >= 0) order[place] = static_cast<std::int32_t>(i / divisor);
  }
};

// Experts are few: each thread adds up those before its own.
__global__ void add_counts(std::int32_t* offset, const std::int32_t* counts, std::int64_t experts) {
  for (std::int64_t e = threadIdx.x; e <= experts; e += blockDim.x) {
    std::int32_t before = 0;
    for (std::int64_t i = 0; i < e; ++i) before += counts[i];
    offset[e] = before;
  }
}

// Item t * nodes + m: has token t business on node m?
struct NodeKey {
  const std::int32_t* index;
  std::int64_t k, nodes;
  Begins begin;
  __device__ std::int32_t operator()(std::int64_t i) const {
    const std::int64_t t = i / nodes, m = i % nodes;
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t e = index[t * k + j];
      if (begin.at[m] <= e && e < begin.at[m + 1]) return static_cast<std::int32_t>(m);
    }
    return -1;
  }
};

struct Choices {
  std::int32_t* index_XK;
  float* weight_XK;
  const std::int32_t *order, *index;
  const float* weight;
};
__global__ void choices_of_nodes(Choices c, Begins expert, Begins row_of_node, int nodes, std::int64_t rows,
                                 std::int64_t k) {
  const std::int64_t i = global_thread();
  if (i >= rows * k) return;
  const std::int64_t row = i / k, t = c.order[row];
  // Nodes are few: looking through them costs less than a search.
  int m = 0;
  while (m + 1 < nodes && row >= row_of_node.at[m + 1]) ++m;
  const std::int64_t e = c.index[t * k + i % k];
  const bool here = expert.at[m] <= e && e < expert.at[m + 1];
  c.index_XK[i] = here ? static_cast<std::int32_t>(e - expert.at[m]) : -1;
  c.weight_XK[i] = here ? c.weight[t * k + i % k] : 0.0f;
}

__global__ void regroup(std::int32_t* regrouped, std::int32_t* ungrouped, const std::int64_t* arrival_begin,
                        const std::int64_t* grouped_begin, std::int64_t runs, std::int64_t rows) {
  const std::int64_t arrival = global_thread();
  if (arrival >= rows) return;
  // Rows arrive by the rank they come from and, within that, by expert; the products want them by expert. Both are the
  // same runs in another order, so a row only has to find its run:
  //
  //   arrival   | rank 0: e0 e1 | rank 1: e0 e1 |        grouped   | e0 of 0 and 1 | e1 of 0 and 1 |
  std::int64_t low = 0, high = runs;  // the last run that begins at or before it, of those that begin there
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (arrival_begin[middle] <= arrival ? low : high) = middle;
  }
  const std::int64_t grouped = grouped_begin[low] + arrival - arrival_begin[low];
  regrouped[grouped] = static_cast<std::int32_t>(arrival);
  ungrouped[arrival] = static_cast<std::int32_t>(grouped);
}

// A block of kThreads is some rows by some lanes, each with up to kEach words of its row.
// Narrow rows share a block, so that no thread is without work; a row of one word (a routing weight) has one lane.
constexpr std::int64_t kEach = 4;
dim3 lanes_by_rows(std::int64_t words) {
  const auto wanted = static_cast<std::uint64_t>(std::clamp<std::int64_t>(words / kEach, 1, kThreads));
  const auto lanes = static_cast<unsigned>(std::bit_ceil(wanted));
  return {lanes, kThreads / lanes};
}
__device__ inline std::int64_t row_of_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Rows are bytes here, moved in words of W.
template <class W>
__global__ void gather(W* out, const W* in, const std::int32_t* index, std::int64_t rows, std::int64_t words,
                       std::int64_t divisor, std::int64_t limit, FindingWords findings) {
  const std::int64_t row = row_of_thread();
  if (row >= rows) return;
  const std::int32_t from = index[row];
  const bool valid = from >= 0 && from < limit;
  if (!valid && threadIdx.x == 0) find(findings, Finding::kIndex, row, static_cast<std::uint32_t>(from));
  const W* source = valid ? in + from / divisor * words : nullptr;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x)
    out[row * words + i] = valid ? source[i] : W{};
}

template <class W>
void launch_gather(const Exec& ex, const TensorView& out_ND, const ConstTensorView& in_XD,
                   const ConstTensorView& index_N, std::int64_t divisor) {
  const std::int64_t rows = out_ND.rows();
  const auto words = static_cast<std::int64_t>(out_ND.bytes() / sizeof(W)) / rows;
  const dim3 block = lanes_by_rows(words);
  launch(ex, blocks_for(rows, block.y), block, gather<W>, reinterpret_cast<W*>(out_ND.data),
         reinterpret_cast<const W*>(in_XD.data), index_N.as<std::int32_t>(), rows, words, divisor,
         checked_mul(in_XD.rows(), divisor), stream_of(ex).findings());
}

// SumOnto on the device: null where not given.
template <class Y, class X>
struct Onto {
  const Y *base, *residual;
  const float *dgate, *gate;
  const X* w;
};

// y[t] = the sum of its rows, in k order, added to `onto`; a thread has N columns of a token at a time. Rows are loaded
// kEach at a time, whether they are there or not, so that their loads do not wait for each other.
template <int N, class Y, class X>
__global__ void sum_rows(Y* y, const X* rows, const std::int32_t* slot, Onto<Y, X> onto, std::int64_t tokens,
                         std::int64_t width, int k, std::int64_t limit, FindingWords findings) {
  const std::int64_t t = row_of_thread();
  if (t >= tokens) return;
  const float dlogit = onto.dgate != nullptr ? onto.dgate[t] * onto.gate[t] * (1.0f - onto.gate[t]) : 0.0f;
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x) * N; c < width; c += blockDim.x * N) {
    float sum[N] = {}, before[N] = {}, residual[N] = {}, weight[N] = {};
    if (onto.base != nullptr) load_floats(before, onto.base + t * width + c);
    if (onto.residual != nullptr) load_floats(residual, onto.residual + t * width + c);
    if (onto.dgate != nullptr) load_floats(weight, onto.w + c);
    for (int first = 0; first < k; first += kEach) {
      Pack<X, N> v[kEach] = {};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (first + j >= k) continue;
        const std::int32_t from = slot[t * k + first + j];
        if (from < -1 || from >= limit) find(findings, Finding::kIndex, t, static_cast<std::uint32_t>(from));
        if (from >= 0 && from < limit) v[j] = *reinterpret_cast<const Pack<X, N>*>(rows + from * width + c);
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += to_float(v[j].at[n]);
    }
    if (onto.dgate != nullptr) {
#pragma unroll
      for (int n = 0; n < N; ++n) before[n] = to_float(from_float<Y>(before[n] + dlogit * weight[n]));
    }
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] += before[n];
    if (onto.residual != nullptr) {
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] = to_float(from_float<Y>(sum[n])) + residual[n];
    }
    store_floats(y + t * width + c, sum);
  }
}

}  // namespace

void expand_choices(Exec& ex, TensorView index_TS, ConstTensorView index_TK, ConstTensorView piece_EP) {
  const std::int64_t choices = index_TK.elements(), pieces = piece_EP.shape[1];
  stream_of(ex).limit(Finding::kIndex, piece_EP.shape[0]);
  launch(ex, blocks_for(choices * pieces, kThreads), kThreads, expand, index_TS.as<std::int32_t>(),
         index_TK.as<std::int32_t>(), piece_EP.as<std::int32_t>(), choices, pieces, piece_EP.shape[0],
         stream_of(ex).findings());
}

void sort_by_expert(Exec& ex, TensorView order_N, TensorView slot_TK, TensorView counts_E,
                    ConstTensorView index_TK) {
  const std::int64_t experts = counts_E.shape[0];
  stream_of(ex).limit(Finding::kIndex, experts);
  counting_sort(ex, index_TK.elements(), experts,
                ExpertKey{index_TK.as<std::int32_t>(), experts, stream_of(ex).findings()},
                OrderAndSlot{order_N.as<std::int32_t>(), slot_TK.as<std::int32_t>(), 1},
                counts_E.as<std::int32_t>());
}

void row_offsets(Exec& ex, TensorView offset_e1, ConstTensorView counts_e) {
  launch(ex, 1, kThreads, add_counts, offset_e1.as<std::int32_t>(), counts_e.as<std::int32_t>(),
         counts_e.elements());
}

void group_by_node(Exec& ex, TensorView order_X, TensorView slot_TM, TensorView counts_M,
                   ConstTensorView index_TK, std::span<const std::int64_t> node_begin) {
  const std::int64_t tokens = index_TK.shape[0], nodes = static_cast<std::int64_t>(node_begin.size()) - 1;
  counting_sort(ex, tokens * nodes, nodes,
                NodeKey{index_TK.as<std::int32_t>(), index_TK.shape[1], nodes, begins_of(node_begin)},
                OrderAndSlot{order_X.as<std::int32_t>(), slot_TM.as<std::int32_t>(), nodes},
                counts_M.as<std::int32_t>());
}

void node_choices(Exec& ex, TensorView index_XK, TensorView weight_XK, const NodeRows& nodes,
                  ConstTensorView index_TK, ConstTensorView weight_TK) {
  const auto& [order_X, counts_M, node_begin] = nodes;
  const std::int64_t k = index_TK.shape[1], rows = index_XK.shape[0];
  std::vector<std::int64_t> first{0};
  for (std::int64_t n : counts_M) first.push_back(first.back() + n);
  const Choices c{index_XK.as<std::int32_t>(), weight_XK.as<float>(), order_X.as<std::int32_t>(),
                  index_TK.as<std::int32_t>(), weight_TK.as<float>()};
  launch(ex, blocks_for(rows * k, kThreads), kThreads, choices_of_nodes, c, begins_of(node_begin),
         begins_of(first), static_cast<int>(counts_M.size()), rows, k);
}

void regroup_runs(Exec& ex, TensorView regroup_R, TensorView ungroup_R,
                  std::span<const std::int64_t> arrival_begin, std::span<const std::int64_t> grouped_begin) {
  const auto runs = static_cast<std::int64_t>(grouped_begin.size());
  std::vector<std::int64_t> begins(arrival_begin.begin(), arrival_begin.end());
  begins.insert(begins.end(), grouped_begin.begin(), grouped_begin.end());
  ScratchScope scope(*ex.scratch);
  auto* on_device = ex.scratch->take({2 * runs + 1}, DType::kI64, "runs of arrived rows").as<std::int64_t>();
  check(cudaMemcpyAsync(on_device, begins.data(), begins.size() * sizeof begins[0], cudaMemcpyDefault,
                        stream_of(ex).raw()));
  launch(ex, blocks_for(regroup_R.elements(), kThreads), kThreads, regroup, regroup_R.as<std::int32_t>(),
         ungroup_R.as<std::int32_t>(), on_device, on_device + runs + 1, runs, regroup_R.elements());
}

void gather_rows(Exec& ex, TensorView out_ND, ConstTensorView in_XD, ConstTensorView index_N,
                 std::int64_t divisor) {
  if (out_ND.bytes() == 0) return;
  stream_of(ex).limit(Finding::kIndex, checked_mul(in_XD.rows(), divisor));
  const auto row_bytes = static_cast<std::int64_t>(out_ND.bytes()) / out_ND.rows();
  if (packs<16>(row_bytes, out_ND.data, in_XD.data))
    return launch_gather<Pack<std::uint32_t, 4>>(ex, out_ND, in_XD, index_N, divisor);
  if (packs<4>(row_bytes, out_ND.data, in_XD.data))
    return launch_gather<std::uint32_t>(ex, out_ND, in_XD, index_N, divisor);
  launch_gather<std::uint16_t>(ex, out_ND, in_XD, index_N, divisor);
}

void gather_sum_rows(Exec& ex, TensorView y_TD, ConstTensorView rows_ND, ConstTensorView slot_TK,
                     const SumOnto& to) {
  const std::int64_t tokens = y_TD.shape[0], width = y_TD.shape[1], limit = rows_ND.shape[0];
  stream_of(ex).limit(Finding::kIndex, limit);
  with_float_type(y_TD.dtype, [&](auto y_type) {
    with_float_type(rows_ND.dtype, [&](auto x_type) {
      using Y = decltype(y_type);
      using X = decltype(x_type);
      constexpr int N = kPack<X>;
      const Onto<Y, X> onto{to.base_TD.if_given<Y>(), to.residual_TD.if_given<Y>(),
                            to.gate.dgate_T.if_given<float>(), to.gate.gate_T.if_given<float>(),
                            to.gate.w_1D.if_given<X>()};
      const bool wide =
          packs<N>(width, y_TD.as<Y>(), onto.base, onto.residual) && packs<N>(width, rows_ND.as<X>(), onto.w);
      const dim3 block = lanes_by_rows(wide ? width / N * kEach : width);
      launch(ex, blocks_for(tokens, block.y), block, wide ? sum_rows<N, Y, X> : sum_rows<1, Y, X>,
             y_TD.as<Y>(), rows_ND.as<X>(), slot_TK.as<std::int32_t>(), onto, tokens, width,
             static_cast<int>(slot_TK.shape[1]), limit, stream_of(ex).findings());
    });
  });
}

}  // namespace upmoe::cuda
